"""The inputs of an evaluation, opened and checked before anything is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pecobook.analysis.fid import Gaussian
from pecobook.analysis.wording import unique_names
from pecobook.commands.analyze.inputs import open_distance
from pecobook.commands.evaluate.statistics import Provenance, read_statistics
from pecobook.data.images import check_readable, open_all_splits
from pecobook.data.source import ImageSource
from pecobook.engine.value_range import open_readable, set_value_range
from pecobook.errors import ConfigError, PecobookError, Preflight, WeightsError
from pecobook.models.judges import Inception, WeightsFile, load_inception, load_lpips
from pecobook.models.perceptual import PerceptualDistance
from pecobook.models.tokenizer import require_pixels
from pecobook.models.tokenizers import load_tokenizer
from pecobook.settings.evaluate import METRICS, EvaluateConfig
from pecobook.utils.devices import device
from pecobook.utils.json_files import OBJECT, list_of
from pecobook.utils.output_folder import OutputFolder


@dataclasses.dataclass
class Inputs:
    """The opened inputs of an evaluation."""

    config: EvaluateConfig
    names: list[str]
    tokenizers: list[Any]
    sizes: list[int]
    """Side of each tokenizer's images, in pixels."""
    sources: list[ImageSource]
    split: str
    """The images in words."""
    metrics: set[str]
    """The metrics that can be measured."""
    missing: dict[str, str]
    """Metric that cannot be measured -> why, and how it could be."""
    inception: Inception | None = None
    lpips: nn.Module | None = None
    distance: PerceptualDistance | None = None
    networks: dict[str, WeightsFile] = dataclasses.field(default_factory=dict)
    statistics: Gaussian | None = None
    statistics_words: str = ""

    @property
    def num_images(self) -> int:
        """Number of requested images."""
        total = sum(map(len, self.sources))
        return min(self.config.num_images or total, total)

    def provenance(self, size: int) -> Provenance:
        """Return what determines the statistics of the originals at `size` pixels."""
        assert self.inception is not None
        ranges = [source.value_range and list(source.value_range) for source in self.sources]
        return {
            "images": [source.fingerprint for source in self.sources],
            "num_images": self.num_images,
            "value_range": ranges,
            "image_size": size,
            "crop": "central square, bicubic, antialiased",
            "inception": self.inception.weights.sha256,
        }


def folder_of(config: EvaluateConfig) -> OutputFolder:
    """Return the output folder with its rules."""
    return OutputFolder(
        config.out,
        example="runs/evaluation",
        kind="an evaluation",
        marker="evaluation.json",
        schema={"protocol": OBJECT, "tokenizers": list_of(OBJECT)},
        files=("evaluation.json", "evaluation.md"),
        data=config.data,
        overwrite=config.overwrite,
    )


def open_inputs(config: EvaluateConfig) -> Inputs:
    """Open all inputs of the settings. Raises PreflightError with all problems, not only the first."""
    preflight = Preflight()
    preflight.check(folder_of(config).check)
    if not config.tokenizers:
        text = "Tokenizers are missing: pecobook evaluate TOKENIZER [TOKENIZER ...] --data SOURCE --out DIR."
        preflight.problems.append(ConfigError(text))
    opened = preflight.check(lambda: _open_images(config))
    names = unique_names(config.tokenizers)
    loaded = [preflight.check(partial(_load, source)) for source in config.tokenizers]
    tokenizers = [tokenizer for tokenizer in loaded if tokenizer is not None]
    sizes: list[int] = []
    if len(tokenizers) == len(names):
        found = [preflight.check(partial(_size, config, *pair)) for pair in zip(names, tokenizers, strict=True)]
        sizes = [size for size in found if size is not None]
    sources, split = opened or ([], "")
    wanted: set[str] = {*(config.metrics or METRICS)}
    inputs = Inputs(config, names, tokenizers, sizes, sources, split, wanted, {})
    _open_judges(inputs, preflight)
    preflight.finish()
    if config.statistics:
        preflight.check(lambda: _open_statistics(inputs))
        preflight.finish()
    return inputs


def _load(source: str) -> Any:
    tokenizer = load_tokenizer(source)
    require_pixels(tokenizer, f"'{source}'", "be evaluated by reconstructions; 'pecobook analyze' measures its codes")
    return tokenizer


def _open_images(config: EvaluateConfig) -> tuple[list[ImageSource], str]:
    if config.split == "all":
        sources = open_all_splits(config.data)
        set_value_range(sources, config.value_range, config.tokenizers)
        check_readable(sources[0])
        return sources, "all splits"
    splits = open_readable(config.data, config.value_range, config.tokenizers)
    if config.split == "train":
        return [splits.train], "training images"
    return [splits.evaluation], splits.evaluation_name


def _size(config: EvaluateConfig, name: str, tokenizer: Any) -> int:
    size, stride = config.image_size or tokenizer.image_size, tokenizer.stride
    if size % stride:
        nearest = max(round(size / stride), 1) * stride
        raise ConfigError(f"'{name}' reads multiples of {stride} pixels, not {size}: give --image-size {nearest}.")
    return int(size)


def _open_judges(inputs: Inputs, preflight: Preflight) -> None:
    """Open the networks that the metrics need; a metric that was not named is dropped if its network is missing."""
    config = inputs.config

    def attempt(metrics: tuple[str, ...], of_file: str, opening: Callable[[], None]) -> None:
        """Collect the error of a metric or a file that the user named, or note what else is missing."""
        wanted = [metric for metric in metrics if metric in inputs.metrics]
        if not wanted:
            return
        try:
            opening()
        except PecobookError as error:
            if of_file:
                preflight.problems.append(error)
            elif named := [metric for metric in wanted if metric in config.metrics]:
                preflight.problems.append(WeightsError(f"--metrics {' '.join(named)} cannot be measured: {error}"))
            inputs.missing |= dict.fromkeys(wanted, str(error))
            inputs.metrics -= set(wanted)

    def inception() -> None:
        inputs.inception = load_inception(config.inception_weights).to(device())
        inputs.networks["inception"] = inputs.inception.weights

    def lpips() -> None:
        inputs.lpips, inputs.networks["lpips"] = load_lpips(config.lpips_network, config.lpips_weights)
        inputs.lpips.to(device())
        for size in dict.fromkeys(inputs.sizes):
            _check_lpips(inputs.lpips, size)

    def perceptual() -> None:
        if not config.perceptual:
            raise ConfigError("Name a network: --perceptual NETWORK.")
        names = inputs.names if len(inputs.sizes) == len(inputs.names) else []
        inputs.distance = open_distance(config, dict(zip(names, inputs.sizes, strict=False)))

    attempt(("rfid", "is"), config.inception_weights, inception)
    attempt(("lpips",), config.lpips_weights, lpips)
    attempt(("perceptual",), config.perceptual, perceptual)


@torch.inference_mode()
def _check_lpips(lpips: nn.Module, size: int) -> None:
    images = torch.zeros(1, 3, size, size, device=device())
    try:
        lpips(images, images)
    except RuntimeError:
        raise WeightsError(f"LPIPS reads no images of {size} pixels: give a larger --image-size.") from None


def _open_statistics(inputs: Inputs) -> None:
    if "rfid" not in inputs.metrics:
        raise ConfigError("--statistics is for rfid, which is not measured here.")
    sizes = sorted(set(inputs.sizes))
    if len(sizes) > 1:
        text = f"--statistics holds one image size, but these tokenizers read {' and '.join(map(str, sizes))} pixels"
        raise ConfigError(f"{text}: give --image-size.")
    file = Path(inputs.config.statistics).expanduser()
    if file.suffix != ".npz":
        raise ConfigError(f"--statistics is a file .npz, not '{file}'.")
    if not file.exists():
        if not file.parent.is_dir():
            raise ConfigError(f"--statistics '{file}': there is no folder '{file.parent}'.")
        return
    inputs.statistics, inputs.statistics_words = read_statistics(file, inputs.provenance(sizes[0]))
