"""Finds boxes and masks written in a convention other than COCO's, which no single object reveals.

COCO's boxes are x, y, width and height in pixels, and its run lengths go down the columns.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pecobook.data.dense.coco_annotations import Annotations, Floats
from pecobook.data.dense.coco_values import mask_box, run_lengths, runs_box
from pecobook.data.source import Integers

_TOLERANCE = 2.0  # pixels by which the edges of an object's box and of its mask may differ
_CONVENTION = "but COCO's boxes are x, y, width and height in pixels"
SHARES = "they seem to be shares of the image's width and height"
UNKNOWN = "the cause is unknown"
_CAUSES = {
    "corners": "they seem to be left, top, right and bottom",
    "centre": "they seem to be the centre, width and height",
    "swapped": "rows and columns seem to be swapped",
    "shares": SHARES,
    "percent": "they seem to be percentages of the image's width and height",
    "scaled": "they seem to belong to images of another size",
    "runs": "the run lengths seem to go along the rows, but COCO's go down the columns",
}


def _readings(boxes: Floats) -> dict[str, Floats]:
    """Return boxes (n, 4) as x, y, width and height, for each other way of reading the four numbers."""
    first, second = boxes[:, :2], boxes[:, 2:]
    return {
        "corners": np.c_[first, second - first],
        "centre": np.c_[first - second / 2, second],
        "swapped": boxes[:, [1, 0, 3, 2]],
    }


def diagnose_boxes(boxes: Floats, sizes: Floats) -> str:
    """Return what is wrong with most boxes of a file, or an empty text.

    Args:
        boxes: x, y, width and height of each object, as in the file, (n, 4).
        sizes: height and width of the object's image, (n, 2).
    """
    if not len(boxes):
        return ""
    is_share = (boxes >= -0.01).all(1) & (boxes[:, :2] + boxes[:, 2:] <= 1.01).all(1) & (sizes.min(1) > 4)
    if is_share.mean() > 0.5 and (boxes[is_share, 2:] > 0).all(1).any():
        return (
            f"{is_share.sum():,} of {len(boxes):,} boxes lie between 0 and 1, as shares of the image, {_CONVENTION}: "
            "multiply them by the width and height of the image"
        )
    beyond = ~_is_inside(boxes, sizes)
    # Some annotators let boxes reach beyond the image, so the other reading must fit too; more boxes are surer.
    most, least_fitting = (0.05, 0.99) if len(boxes) >= 50 else (0.2, 0.95) if len(boxes) >= 5 else (0.5, 0.95)
    if beyond.mean() > most:
        count = f"{beyond.sum():,} of {len(boxes):,} boxes reach beyond their image"
        for name, reading in _readings(boxes).items():
            if (_is_inside(reading, sizes) & (reading[:, 2:] >= 0).all(1)).mean() > least_fitting:
                return f"{count}: {_CAUSES[name]}, {_CONVENTION}"
        if beyond.mean() > 0.5:
            return f"{count}: {_CAUSES['scaled']}, {_CONVENTION}"
    return ""


def are_in_corner(boxes: Floats, sizes: Floats) -> bool:
    """Return whether many boxes all lie in the upper left quarter of their images, as those of smaller images do."""
    ends = (boxes[:, :2] + boxes[:, 2:]) / sizes[:, ::-1]
    return len(boxes) >= 20 and float(ends.max()) < 0.55


def _is_inside(boxes: Floats, sizes: Floats) -> npt.NDArray[np.bool_]:
    """Return whether each box lies within its image, with a tolerance of one pixel: (n,)."""
    return np.asarray((boxes[:, :2] >= -1).all(1) & (boxes[:, :2] + boxes[:, 2:] <= sizes[:, ::-1] + 1).all(1))


@dataclasses.dataclass(frozen=True)
class BoxComparison:
    """The result of comparing boxes with the masks of the same objects."""

    compared: int
    """Number of objects that were compared."""
    differing: tuple[int, ...]
    """Index in the annotations of each object whose box does not fit its mask."""
    cause: str
    """Why most objects differ, as a text; empty if at most half of them differ."""
    num_blank: int = 0
    """Number of objects, not compared, whose mask is too thin to cover a pixel."""


def compare_boxes(annotations: Annotations, limit: int | None = 2000) -> BoxComparison:
    """Compare the boxes with the boxes around the masks of the same objects.

    A box fits if each edge is within two pixels of the mask's, or if their IoU is above one half.

    Args:
        annotations: objects with masks; without masks nothing is compared.
        limit: compare at most this number of objects, evenly spread over the file; None compares all.
    """
    numbers = np.flatnonzero(~annotations.crowd)
    if limit is not None and len(numbers) > limit:
        numbers = numbers[np.linspace(0, len(numbers) - 1, limit).astype(np.int64)]
    if annotations.segments is None or not len(numbers):
        return BoxComparison(0, (), "")
    rows = np.searchsorted(annotations.starts, numbers, side="right") - 1
    sizes = annotations.sizes[rows]
    segments = [json.loads(segment) for segment in annotations.segments_of(numbers.tolist()) or ()]
    pairs = list(zip(segments, sizes.tolist(), strict=True))
    around_masks = np.array([mask_box(segment, *size) for segment, size in pairs], np.float64)
    boxes = annotations.boxes[numbers]
    if _are_by_rows(pairs):
        return BoxComparison(len(numbers), tuple(numbers.tolist()), _CAUSES["runs"])
    is_drawn = (around_masks[:, 2:] > 0).all(1)  # a thin polygon may cover the centre of no pixel
    differs = is_drawn & ~_fits(boxes, around_masks)
    cause = ""
    if differs.sum() > is_drawn.sum() / 2:
        chosen = np.flatnonzero(differs)
        cause = _likely_cause(boxes[chosen], around_masks[chosen], sizes[chosen], [pairs[n] for n in chosen.tolist()])
    num_compared, num_blank = int(is_drawn.sum()), int((~is_drawn).sum())
    return BoxComparison(num_compared, tuple(numbers[differs].tolist()), cause, num_blank)


def _likely_cause(
    boxes: Floats, around_masks: Floats, sizes: Integers, pairs: Sequence[tuple[Any, Sequence[int]]]
) -> str:
    """Return the convention that explains at least 80% of the differing boxes, or that none does."""
    readings = _readings(boxes)
    readings["shares"] = boxes * sizes[:, [1, 0, 1, 0]]
    readings["percent"] = readings["shares"] / 100
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.nanmedian(around_masks[:, 2:] / boxes[:, 2:], axis=0)
    readings["scaled"] = boxes * np.nan_to_num(np.tile(factors, 2))
    shares = {name: float(_fits(reading, around_masks).mean()) for name, reading in readings.items()}
    if any(isinstance(segment, dict) for segment, _ in pairs):
        by_rows = [
            runs_box(run_lengths(segment["counts"]), *size, by_rows=True) if isinstance(segment, dict) else (0, 0, 0, 0)
            for segment, size in pairs
        ]
        shares["runs"] = float(_fits(boxes, np.array(by_rows, np.float64)).mean()) + 0.01  # before "swapped"
    best = max(shares, key=lambda name: shares[name])
    return _CAUSES[best] if shares[best] >= 0.8 else UNKNOWN


def _fits(boxes: Floats, others: Floats) -> npt.NDArray[np.bool_]:
    """Return whether the boxes x, y, width and height (n, 4) fit the others: (n,)."""
    start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    other_start, other_end = others[:, :2], others[:, :2] + others[:, 2:]
    common = (np.minimum(end, other_end) - np.maximum(start, other_start)).clip(0).prod(1)
    union = boxes[:, 2:].clip(0).prod(1) + others[:, 2:].prod(1) - common
    is_near = (np.abs(np.c_[start - other_start, end - other_end]) <= _TOLERANCE).all(1)
    return np.asarray(is_near | (2 * common > union))


def _are_by_rows(pairs: Sequence[tuple[Any, Sequence[int]]]) -> bool:
    """Return whether most run-length masks are far more compact if their runs go along the rows.

    Read in the wrong direction, they spread over the whole side; in square images both boxes have the same area.
    """
    areas = []
    for segment, (height, width) in pairs:
        if isinstance(segment, dict) and height != width:
            runs = run_lengths(segment["counts"])
            boxes = [runs_box(runs, height, width, by_rows=by_rows) for by_rows in (False, True)]
            areas.append([box[2] * box[3] for box in boxes])
    return bool(areas) and float(np.mean([by_rows < 0.5 * by_columns for by_columns, by_rows in areas])) > 0.5
