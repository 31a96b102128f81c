"""The cost of a training, a token bank or an analysis, from its settings: operations, GPU-hours and disk.

Nothing is run and no weights are loaded: one forward pass of each network is counted on the meta device. Passes are
counted as in the recipes' docstrings: forward 1, backward 2; losses and heads are left out.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pecobook.errors import PecobookError
from pecobook.models.dalle import DalleTokenizer
from pecobook.models.dense.detector import MASK_SIDE, Detector
from pecobook.models.dense.pyramid import FeaturePyramid, rebuild_pyramid
from pecobook.models.dense.segmenter import Segmenter
from pecobook.models.masked_vit import VisibleOnlyModel
from pecobook.models.network_traits import network_traits
from pecobook.models.networks import create_network
from pecobook.models.tokenizer import build_autoencoder
from pecobook.models.video import ClipNetwork
from pecobook.settings.codebook import CodebookConfig
from pecobook.settings.detect import DetectConfig
from pecobook.settings.pretrain import DecoderConfig
from pecobook.settings.segment import SegmentConfig
from pecobook.settings.tokenizer import AutoencoderConfig
from pecobook.settings.training import BackboneConfig, CompileTrainConfig
from pecobook.settings.values import replace, to_dict
from pecobook.utils.json_files import read_if_valid

TERAFLOPS = {
    "contrast": 200,
    "codebook": 227,
    "tokenize": 227,
    "pretrain": 280,
    "finetune": 280,
    "segment": 200,
    "detect": 100,
    "probe": 100,
    "predict": 100,
    "analyze": 50,
}
"""10^12 operations per second on one H200 in bf16 with --compile on images of 224 pixels. `codebook` and `pretrain`
were measured, and `tokenize` and `finetune` compute in the same way; the others are estimates."""
UNCOMPILED = 0.65
"""Speed without --compile relative to that with it: 0.65 for `codebook`, 0.7 for `pretrain`."""

_FULL_SPEED = 112
"""Side of the smallest images for which these speeds are assumed, in pixels."""

_CLASSES = 100
"""Number of classes of a segmenter or a detector, which the settings do not contain; their layers are small."""
_FEATURES = 768
"""Number of channels of target features, which only affects the last layer of the decoder."""

_UNKNOWN = (PecobookError, LookupError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError)
"""The exceptions raised if a network does not exist, or cannot be built or run without weights."""


class Cost(NamedTuple):
    """The cost of a job."""

    flop: float | None
    """Floating-point operations of the whole job; None if a network is unknown."""
    hours: float | None
    """Hours on one H200; None if `flop` is None or the images are too small for a GPU to reach full speed."""
    disk: float
    """Approximate number of bytes that the job leaves on disk."""


class _Pass(NamedTuple):
    """One forward pass on an image."""

    flop: float
    parameters: int


def job_cost(command: str, config: Any, num_images: int, num_held_out: int, others: Mapping[str, Any]) -> Cost:
    """Return the cost of a job.

    Args:
        command: a key of `TERAFLOPS`; other commands have an unknown cost.
        config: settings of the command; the length of training is given in steps.
        num_images: number of training images.
        num_held_out: number of held-out images.
        others: settings of the jobs that write the networks and tokenizers which this job reads, by folder.
    """
    try:
        if command in _PER_IMAGE:
            flop, disk = _training(command, config, others)
        else:
            flop, disk = _OF_IMAGES[command](config, num_images, num_held_out, others)
    except _UNKNOWN:
        return Cost(None, None, 0.0)
    is_slower = isinstance(config, CompileTrainConfig) and not config.compile
    speed = 1e12 * TERAFLOPS[command] * (UNCOMPILED if is_slower else 1.0)
    of = config
    if command in ("analyze", "predict"):
        of = others.get(config.tokenizer, DalleTokenizer) if command == "analyze" else others[config.run]
    size = getattr(of, "image_size", 0) or _USUAL_SIZE
    return Cost(flop, flop / speed / 3600 if size >= _FULL_SPEED else None, disk)


def known_flop(command: str, config: Any) -> float | None:
    """Return the operations per training image; None if a network is unknown."""
    try:
        return _PER_IMAGE[command](config, {})
    except _UNKNOWN:
        return None


# --------------------------------------------------------------------------------------------------- passes of an image


@functools.cache
def _count(build: Callable[..., nn.Module], size: int, channels: int, *arguments: Any) -> _Pass:
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        module = build(*arguments).eval().requires_grad_(False)  # the counter fails on some weights that take gradients
        with FlopCounterMode(display=False) as counter:
            module(torch.empty(1, channels, size, size))
    parameters = sum(parameter.numel() for parameter in module.parameters())
    return _Pass(float(counter.get_total_flops()), parameters)


def _timm(name: str, args: str, size: int) -> nn.Module:
    arguments = BackboneConfig(name=name, args=args).kwargs()
    fixed = {"img_size": size} if network_traits(name, arguments).takes_size else {}
    return create_network(name, **{"num_classes": 0, **arguments, **fixed})


def _torchvision(name: str) -> nn.Module:
    import torchvision

    network: nn.Module = torchvision.models.get_model(name)
    features = getattr(network, "features", None)
    return features if isinstance(features, nn.Module) else network


def _network(source: str, size: int, others: Mapping[str, Any]) -> _Pass:
    """Count a network named as in --backbone or --perceptual.network. Raises LookupError for an unknown one."""
    if source.startswith("torchvision:"):
        return _count(_torchvision, size, 3, source.removeprefix("torchvision:"))
    return _count(_timm, size, 3, *_backbone(source, others), size)


def _backbone(source: str, others: Mapping[str, Any]) -> tuple[str, str]:
    """Return the timm name and the arguments of a run's network. Raises LookupError for an unknown one."""
    if source.startswith("timm:"):
        return source.removeprefix("timm:"), "{}"
    settings = to_dict(others[source]) if source in others else read_if_valid(Path(source) / "config.json") or {}
    model = settings.get("model")
    if model is None:  # a classifier names the network that it started from
        return _backbone(settings["backbone"], others)
    return model["name"].removeprefix("timm:"), model["args"]


def _own_network(config: Any) -> _Pass:
    """Count the network of --model."""
    return _count(_timm, config.image_size, 3, config.model.name, config.model.args, config.image_size)


def _part(model: AutoencoderConfig, number: int, features: int) -> nn.Module:
    return build_autoencoder(model, features)[number]


def _encoder(model: AutoencoderConfig, size: int) -> _Pass:
    return _count(_part, size, model.in_channels, model, 0, 0)


def _autoencoder(model: AutoencoderConfig, size: int, features: int = 0) -> _Pass:
    encoder, grid = _encoder(model, size), size // model.stride
    decoder = _count(_part, grid, model.latent_dim, model, 1, features)
    return _Pass(encoder.flop + decoder.flop, encoder.parameters + decoder.parameters)


def _tokenizer(source: str, size: int, others: Mapping[str, Any]) -> float:
    """Return the operations of encoding an image with a tokenizer. Raises LookupError for an unknown tokenizer."""
    if source.startswith("dalle:"):
        return _count(_Logits, size, 3).flop
    if source in others:
        return _encoder(others[source].model, size).flop
    settings = (read_if_valid(Path(source) / "config.json") or {})["model"]
    return _encoder(replace(AutoencoderConfig(), settings), size).flop


class _Logits(DalleTokenizer):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.logits(images)
        return logits


def _codebook(config: CodebookConfig, others: Mapping[str, Any]) -> float:
    perceptual = config.perceptual
    if config.target_features:  # the target forward; its number of channels hardly counts
        size = _read_size(config.target_features, config.target.input_size, config.image_size)
        teacher = _network(config.target_features, size, others).flop
        return 3 * _autoencoder(config.model, config.image_size, features=_FEATURES).flop + teacher
    flop = 3 * _autoencoder(config.model, config.image_size).flop
    if perceptual.network != "none" and perceptual.weight:
        for network, _ in perceptual.networks():  # the image forward; the reconstruction forward, back to its pixels
            size = _read_size(network.network, network.input_size, config.image_size)
            flop += 3 * _network(network.network, size, others).flop
    return flop


def _read_size(source: str, input_size: int, image_size: int) -> int:
    """Return the side of the images that a perceptual network reads: timm's transformers have their own size."""
    import timm

    name = source.removeprefix("timm:")
    if input_size or name == source or not network_traits(name).takes_size:
        return input_size or image_size
    settings = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return int(settings.input_size[-1]) if settings is not None else image_size


class _VisibleOnly(nn.Module):
    """The accelerated training with its decoder, on a mask of the given size."""

    def __init__(self, name: str, args: str, size: int, decoder: DecoderConfig, num_masked: int) -> None:
        super().__init__()
        self.model, self.num_masked = VisibleOnlyModel(_timm(name, args, size), 1, decoder), num_masked

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(1, *self.model.grid, dtype=torch.bool)
        logits: torch.Tensor = self.model(images, mask, self.num_masked)
        return logits


def _pretrain(config: Any, others: Mapping[str, Any]) -> float:
    network = _own_network(config)
    if config.visible_only:
        arguments = config.model.name, config.model.args, config.image_size, config.decoder, config.mask.num_masked
        network = _count(_VisibleOnly, config.image_size, 3, *arguments)
    flop = 3 * network.flop
    if config.target == "tokens" and not config.tokens and config.tokenizer:
        flop += _tokenizer(config.tokenizer, config.tokenizer_size or config.image_size, others)
    return flop


def _clips(name: str, args: str, size: int, frames: int) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (frames, 3)), ClipNetwork(_timm(name, args, size), frames))


def _finetuned(config: Any, others: Mapping[str, Any]) -> _Pass:
    size, frames = config.image_size, config.clip.frames
    if not frames:
        return _network(config.backbone, size, others)
    return _count(_clips, size, 3 * frames, *_backbone(config.backbone, others), size, frames)


class _Segmentation(nn.Module):
    """A segmenter with its auxiliary head."""

    def __init__(self, name: str, args: str, config: SegmentConfig) -> None:
        super().__init__()
        pyramid, settings = _pyramid(name, args, config)
        self.model = Segmenter(pyramid, settings, classes=("",) * _CLASSES, config=config)

    def forward(self, images: torch.Tensor) -> None:
        maps = self.model.pyramid(images)
        self.model.head(maps)
        if self.model.auxiliary is not None:
            self.model.auxiliary(maps[2])


class _Detection(nn.Module):
    """A detector, and its heads on as many regions as are sampled per image; a quarter of them contain an object."""

    def __init__(self, name: str, args: str, config: DetectConfig) -> None:
        super().__init__()
        pyramid, settings = _pyramid(name, args, config)
        self.model = Detector(
            pyramid,
            settings,
            classes=("",) * _CLASSES,
            category_ids=range(_CLASSES),
            masks=config.masks,
            sides=config.sides,
            config=config.detector,
        )

    def forward(self, images: torch.Tensor) -> None:
        model, heads, config = self.model, cast("Any", self.model.heads), self.model.config
        levels = model.fpn(OrderedDict((str(level), x) for level, x in enumerate(model.pyramid(images))))
        cast("Any", model.proposals).head(list(levels.values()))
        heads.box_predictor(heads.box_head(torch.empty(config.samples, config.width, 7, 7)))
        if model.has_masks:
            regions = torch.empty(config.samples // 4, config.width, MASK_SIDE // 2, MASK_SIDE // 2)
            heads.mask_predictor(heads.mask_head(regions))


def _pyramid(name: str, args: str, config: SegmentConfig | DetectConfig) -> tuple[FeaturePyramid, dict[str, Any]]:
    arguments = BackboneConfig(name=name, args=args).kwargs()
    settings: dict[str, Any] = {"name": name, "args": arguments, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    settings |= {"image_size": config.image_size, "window": config.pyramid.window}
    return rebuild_pyramid(settings), settings


def _dense(config: SegmentConfig | DetectConfig, others: Mapping[str, Any]) -> _Pass:
    module, size = (_Segmentation, config.image_size) if isinstance(config, SegmentConfig) else (_Detection, 0)
    if isinstance(config, DetectConfig):  # the side of a square with the area of an image of 4 to 3, in whole patches
        short, long = config.sides
        size = 32 * round(math.sqrt(short * min(long, 4 / 3 * short)) / 32)
    return _count(module, size, 3, *_backbone(config.backbone, others), config)


_PER_IMAGE: dict[str, Callable[[Any, Mapping[str, Any]], float]] = {
    # Two views, each forward and back, and forward through the slow encoder.
    "contrast": lambda config, _: 8 * _own_network(config).flop,
    "codebook": _codebook,
    "pretrain": _pretrain,
    "finetune": lambda config, others: 3 * _finetuned(config, others).flop,
    **dict.fromkeys(("segment", "detect"), lambda config, others: 3 * _dense(config, others).flop),
}

# ----------------------------------------------------------------------------------------------------------- whole jobs

_PICTURES = 20e6
"""Bytes of an analysis."""
_USUAL_SIZE = 224
"""Side of the images of a probe that uses its backbone's size, in pixels."""


def _training(command: str, config: Any, others: Mapping[str, Any]) -> tuple[float, float]:
    if command == "codebook":
        parameters = _autoencoder(config.model, config.image_size).parameters
    elif command == "finetune":
        parameters = _finetuned(config, others).parameters
    elif command in ("segment", "detect"):
        parameters = _dense(config, others).parameters
    else:
        parameters = _own_network(config).parameters
    # Weights and two moments in each checkpoint, the slow encoder of `contrast`, and the export; 4 bytes each.
    copies = config.keep_checkpoints * (4 if command == "contrast" else 3) + 1
    flop = _PER_IMAGE[command](config, others) * int(config.max_steps) * config.batch_size
    return flop, 4.0 * parameters * copies


def _bank(config: Any, num_images: int, num_held_out: int, others: Mapping[str, Any]) -> tuple[float, float]:
    views, size = num_images * config.views + num_held_out, config.tokenizer_size or config.image_size
    stride = 8 if config.tokenizer.startswith("dalle:") else others[config.tokenizer].model.stride
    return _tokenizer(config.tokenizer, size, others) * views, 2.0 * views * (size // stride) ** 2


def _analysis(config: Any, num_images: int, num_held_out: int, others: Mapping[str, Any]) -> tuple[float, float]:
    images = min(config.max_train, num_images) + min(config.max_test, num_held_out)
    if config.tokenizer.startswith("dalle:"):
        return 2 * images * _tokenizer(config.tokenizer, DalleTokenizer.image_size, others), _PICTURES
    settings = others[config.tokenizer]
    return images * _autoencoder(settings.model, settings.image_size).flop, _PICTURES


def _probe(config: Any, num_images: int, num_held_out: int, others: Mapping[str, Any]) -> tuple[float, float]:
    images = min(config.max_train, num_images) + min(config.max_test, num_held_out)
    return images * _network(config.backbone, config.image_size or _USUAL_SIZE, others).flop, 0.0


def _attack(config: Any, _num_images: int, num_held_out: int, others: Mapping[str, Any]) -> tuple[float, float]:
    """Count the passes of an attack: each step runs forward and back to the pixels, and the result runs forward."""
    attack, classifier = config.attack, others[config.run]
    passes = 1 + len(attack.names) * (3 * attack.steps + 1)
    images = min(attack.max_images, num_held_out)
    return images * passes * _network(classifier.backbone, classifier.image_size, others).flop, 0.0


_OF_IMAGES: dict[str, Callable[[Any, int, int, Mapping[str, Any]], tuple[float, float]]] = {
    "tokenize": _bank,
    "analyze": _analysis,
    "probe": _probe,
    "predict": _attack,
}
