"""Counts the pixels of each value and of each class in masks."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from pecobook.data.dense.segmentation_classes import MaskClasses


@dataclasses.dataclass(frozen=True)
class MaskCounts:
    """The content of some masks.

    Attributes:
        masks: number of masks.
        values: pixel value -> number of pixels, as the files have them; with colours, a value is the line of the colour
            in the class file, and 65536 stands for every other colour.
        classes: name of the class -> number of pixels.
        ignored: number of pixels that count neither in the loss nor in the scores.
    """

    masks: int
    values: dict[int, int]
    classes: dict[str, int]
    ignored: int


def pixels_per_value(values: npt.NDArray[np.int64]) -> dict[int, int]:
    """Return the number of pixels of each value in a mask (H, W)."""
    counts = np.bincount(values.ravel())
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def pixels_per_class(meaning: MaskClasses, values: Mapping[int, int]) -> dict[str, int]:
    """Return the number of pixels of each class, given that of each value."""
    return {name: values.get(value, 0) for name, value in zip(meaning.names, meaning.values, strict=True)}


def sum_masks(meaning: MaskClasses, masks: Iterable[dict[int, int]]) -> MaskCounts:
    """Add the counts of several masks, each of which has its number of pixels by value."""
    total: Counter[int] = Counter()
    number = 0
    for mask in masks:
        number += 1
        total.update(mask)
    return MaskCounts(
        masks=number,
        values=dict(sorted(total.items())),
        classes=pixels_per_class(meaning, total),
        ignored=sum(total[value] for value in meaning.ignored),
    )
