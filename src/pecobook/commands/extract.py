"""Features of all images of a source: extracted batch by batch, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from pecobook.analysis.arrays import Tokenizer
from pecobook.analysis.reconstruction import encode_all
from pecobook.data.source import ImageSource
from pecobook.data.stream import central_crops
from pecobook.engine.log import Progress
from pecobook.errors import ConfigError
from pecobook.models.dry_run import dry_run
from pecobook.models.export import read_settings
from pecobook.models.tokenizers import FOREIGN
from pecobook.models.weights import Backbone, load_backbone
from pecobook.settings.embed import EmbedConfig
from pecobook.settings.probe import ProbeConfig
from pecobook.utils.devices import device
from pecobook.utils.images import to_float
from pecobook.utils.printer import say


def names_tokenizer(source: str) -> bool:
    """Return whether the value of --backbone names a tokenizer. Raises ConfigError for an empty one, WeightsError."""
    if not source:
        raise ConfigError("--backbone is missing: give a run of pecobook, or timm:NAME.")
    is_run = Path(source).is_dir() and read_settings(source).get("kind") == "tokenizer"
    return is_run or source.partition(":")[0] in FOREIGN


def open_backbone(config: ProbeConfig | EmbedConfig, seed: int) -> tuple[Backbone, int]:
    """Load the frozen network of --backbone, report what was loaded, and return it with its image size in pixels."""
    torch.manual_seed(seed)
    backbone = load_backbone(
        config.backbone,
        weights=config.weights or None,
        image_size=config.image_size or None,
        mean=config.mean,
        std=config.std,
    )
    say("\n".join(backbone.notes))
    return backbone, config.image_size or backbone.image_size or 224


def check_reads(reader: nn.Module, size: int, source: str) -> None:
    """Move `reader`, made from the network `source`, to the device. Raises WeightsError if images do not fit."""
    images = torch.zeros(2, 3, size, size)
    purpose = f"read images of {size} pixels"
    dry_run(reader.eval(), (images,), network=source, purpose=purpose, backward=False)
    reader.to(device())


FeatureFunction = Callable[[Tensor], dict[str, Tensor]]
"""Maps float images (B, 3, S, S) in [0, 1] to named features (B, ...) on the host."""


class _Rows:
    """Rows that arrive in batches, stored in preallocated memory, so that they are never held twice."""

    def __init__(self, most: int) -> None:
        self._most, self._count, self._all = most, 0, torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """Add rows (B, ...), real numbers in half precision if they fit."""
        dtype = rows.dtype
        if rows.is_floating_point():
            dtype = torch.float16 if rows.abs().max() < 6e4 else dtype
        if not self._count:
            self._all = torch.empty(self._most, *rows.shape[1:], dtype=dtype)
        elif torch.promote_types(self._all.dtype, dtype) != self._all.dtype:
            self._all = self._all.to(torch.promote_types(self._all.dtype, dtype))
        self._all[self._count : self._count + len(rows)] = rows.to(dtype)
        self._count += len(rows)

    def added(self) -> Tensor:
        """Return the rows (N, ...)."""
        return self._all[: self._count]


def extract(
    source: ImageSource, size: int, max_images: int, feature_function: FeatureFunction, description: str
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Extract features of central crops batch by batch, so that only one batch of pixels is in memory; show progress.

    Args:
        source: images.
        size: side of the crops, in pixels.
        max_images: maximum number of images; a fixed permutation chooses them.
        feature_function: computes the features of one batch.
        description: text of the progress line.

    Returns:
        features (N, ...) by name, real numbers in half precision if they fit; and labels int64 (N,), or None if the
        source has no labels.
    """
    parts: dict[str, _Rows] = {}
    labels: list[Tensor] = []
    with Progress(total=min(max_images, len(source)), start=0, name=description, quiet=False) as progress:
        for done, batch in central_crops(source, size, limit=max_images):
            if "image" in batch:
                for name, value in feature_function(to_float(batch["image"])).items():
                    parts.setdefault(name, _Rows(progress.total)).add(value)
                labels += [batch["label"]] if "label" in batch else []
            progress.show(done, {})
    features = {name: rows.added() for name, rows in parts.items()}
    return features, None if source.labels is None else torch.cat(labels)


def extract_codes(
    tokenizer: Tokenizer, source: ImageSource, size: int, max_images: int, description: str
) -> tuple[Tensor, Tensor | None]:
    """Extract codes int32 (N, h, w), and labels, as `extract` does."""
    found, labels = extract(
        source, size, max_images, lambda images: {"codes": encode_all(tokenizer, images).int()}, description
    )
    return found["codes"], labels
