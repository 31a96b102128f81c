"""Features of all images of a source: extracted batch by batch, with a progress bar."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pecobook.data.source import ImageSource
from pecobook.data.stream import central_crops
from pecobook.engine.log import Progress
from pecobook.utils.images import to_float

FeatureFunction = Callable[[Tensor], dict[str, Tensor]]
"""Maps float images (B, 3, S, S) in [0, 1] to named features (B, ...) on the host."""


def extract(
    source: ImageSource, size: int, max_images: int, feature_function: FeatureFunction, description: str
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Extract features of central crops batch by batch, so that only one batch of pixels is in memory; show progress.

    Args:
        source: images.
        size: side of the crops, pixels.
        max_images: largest number of images; a fixed permutation chooses them.
        feature_function: computes the features of one batch.
        description: text of the progress line.

    Returns:
        name to features (N, ...), real numbers in half precision where they fit; and labels int64 (N,), or None when
        the source has no labels.
    """
    parts: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    progress = Progress(total=min(max_images, len(source)), start=0, name=description, quiet=False)
    for done, batch in central_crops(source, size, limit=max_images):
        if "image" in batch:
            for name, value in feature_function(to_float(batch["image"])).items():
                fits = value.is_floating_point() and value.abs().max() < 6e4
                parts.setdefault(name, []).append(value.half() if fits else value)
            labels += [batch["label"]] if "label" in batch else []
        progress.show(done, {})
    progress.close()
    features = {name: torch.cat(values) for name, values in parts.items()}
    return features, None if source.labels is None else torch.cat(labels)
