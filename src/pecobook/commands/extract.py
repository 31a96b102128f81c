"""Features of a source of images, a batch of pixels at a time, with progress."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pecobook.data.source import ImageSource
from pecobook.data.stream import central_crops
from pecobook.engine.log import Progress
from pecobook.utils.images import to_float

Features = Callable[[Tensor], dict[str, Tensor]]
"""Float images (B, 3, S, S) in [0, 1] to named features (B, ...) on the host."""


def extract(
    source: ImageSource, size: int, limit: int, features: Features, what: str
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Features of central crops, batch by batch, so that no more than a batch of pixels is held; shows progress.

    Args:
        source: images.
        size: side of the crops, pixels.
        limit: most images; a fixed permutation chooses them.
        features: of a batch.
        what: is extracted, for the progress line.

    Returns:
        name to (N, ...), real numbers in half precision where they fit, and labels int64 (N,) where there are some.
    """
    found: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    progress = Progress(total=min(limit, len(source)), start=0, name=what, quiet=False)
    for done, batch in central_crops(source, size, limit=limit):
        if "image" in batch:
            for name, value in features(to_float(batch["image"])).items():
                fits = value.is_floating_point() and value.abs().max() < 6e4
                found.setdefault(name, []).append(value.half() if fits else value)
            labels += [batch["label"]] if "label" in batch else []
        progress.show(done, {})
    progress.close()
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return joined, None if source.labels is None else torch.cat(labels)
