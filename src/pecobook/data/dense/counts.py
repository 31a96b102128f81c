"""Counts what a source with masks or objects teaches: the objects of each class, and the pixels of each class."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pecobook.data.decode import BadImage
from pecobook.utils.devices import cores

if TYPE_CHECKING:
    from pecobook.data.dense.detection import DetectionSource
    from pecobook.data.dense.segmentation import SegmentationSource


def objects_per_class(source: DetectionSource) -> dict[str, int]:
    """Return the number of objects of each class, without crowds, over the images of a source."""
    return source.objects_per_class()


@dataclasses.dataclass(frozen=True)
class MaskCounts:
    """The content of some masks.

    Attributes:
        masks: number of masks that were read.
        unreadable: number of masks that cannot be read.
        values: pixel value -> number of pixels, as the files have them; with colours, a value is the line of the colour
            in the class file, and 65536 stands for every other colour.
        classes: name of the class -> number of pixels. Empty as long as the classes are unknown.
        ignored: number of pixels that count neither in the loss nor in the scores.
        unknown: number of pixels whose value belongs to no class and is not ignored.
    """

    masks: int
    unreadable: int
    values: dict[int, int]
    classes: dict[str, int]
    ignored: int
    unknown: int


def count_masks(source: SegmentationSource, indices: Iterable[int] | None = None) -> MaskCounts:
    """Count the pixels of each value and of each class in the masks of a source, on all cores.

    Args:
        source: images with masks.
        indices: numbers of the images; None counts the masks of all images.
    """
    from concurrent.futures import ThreadPoolExecutor

    def values_of(index: int) -> dict[int, int] | None:
        try:
            values, _ = source.read_values(index)
        except BadImage:
            return None
        return pixels_per_value(values)

    with ThreadPoolExecutor(max_workers=len(cores())) as pool:
        parts = list(pool.map(values_of, range(len(source)) if indices is None else indices))
    return summarise_values(source, parts)


def pixels_per_value(values: npt.NDArray[np.int64]) -> dict[int, int]:
    """Return the number of pixels of each value in a mask (H, W)."""
    counts = np.bincount(values.ravel())
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def summarise_values(source: SegmentationSource, parts: Iterable[dict[int, int] | None]) -> MaskCounts:
    """Add the counts of several masks; None stands for a mask that cannot be read."""
    total: Counter[int] = Counter()
    masks = unreadable = 0
    for part in parts:
        masks, unreadable = masks + (part is not None), unreadable + (part is None)
        total.update(part or {})
    meaning = source.mask_classes
    classes = {name: total[value] for name, value in zip(meaning.names, meaning.values, strict=True)}
    ignored = sum(total[value] for value in meaning.ignored)
    return MaskCounts(
        masks=masks,
        unreadable=unreadable,
        values=dict(sorted(total.items())),
        classes=classes,
        ignored=ignored,
        unknown=total.total() - ignored - sum(classes.values()) if meaning.names else 0,
    )
