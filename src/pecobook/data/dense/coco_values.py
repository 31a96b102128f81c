"""Values of a file in COCO's format: numbers, which some tools write as text, boxes, categories, and masks.

Masks are polygons, run lengths, or compressed run lengths. pycocotools does not validate its input and may read past
the end of a text, so masks are checked before they reach it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pecobook.data.source import Integers
from pecobook.utils.json_files import is_number

_INTEGER = re.compile(r"\s*([+-]?\d{1,19})(\.0*)?\s*", re.ASCII)
_FLAGS = {"0": False, "1": True, "false": False, "true": True, "none": False, "": False}


class UnusableError(ValueError):
    """An image or an object that cannot be used, with the reason under which it is counted."""

    def __init__(self, text: str, reason: str = "objects that cannot be used") -> None:
        super().__init__(text)
        self.reason = reason


def as_integer(value: Any) -> int | None:
    """Return a JSON value as an integer that fits into 64 bits, even if it is written as 7.0 or "7"; otherwise None."""
    if type(value) is int:
        return value if abs(value) < 2**63 else None
    if isinstance(value, str):
        match = _INTEGER.fullmatch(value)
        value = int(match[1]) if match else None
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None
    return value if type(value) is int and abs(value) < 2**63 else None


def as_number(value: Any) -> float | None:
    """Return a JSON value as a finite number, even if it is written as text; otherwise None."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if is_number(value) else None


def as_flag(value: Any) -> bool:
    """Return a JSON value as a flag, even if it is written as "0" or "false". Raises UnusableError."""
    text = str(as_integer(value)) if as_integer(value) is not None else str(value).strip().lower()
    if text not in _FLAGS:
        raise UnusableError(f"has an 'iscrowd' that is neither 0 nor 1: {json.dumps(value)[:40]}")
    return _FLAGS[text]


def parse_box(box: Any, compute: Callable[[], Any] | None) -> tuple[float, float, float, float]:
    """Return x, y, width and height of a box.

    Args:
        box: the box in the file, or None.
        compute: computes a missing box from the mask; None if there is no mask.

    Raises:
        UnusableError: the box is not four numbers.
    """
    values = compute() if box is None and compute else box
    numbers = [as_number(value) for value in values] if isinstance(values, list) else []
    if len(numbers) != 4 or None in numbers:
        raise UnusableError(f"has a 'bbox' that is not four numbers: {json.dumps(box)[:40]}")
    x, y, width, height = (math.nan if number is None else float(number) for number in numbers)
    return x, y, width, height


def format_size(size: Sequence[Any]) -> str:
    """Format height and width as "width x height"."""
    return f"{size[1]} x {size[0]}"


def read_categories(categories: list[Any], used: set[int]) -> tuple[dict[int, str], list[str]]:
    """Return id -> name of the categories in ascending order of the ids, and notes on entries that are odd or left out.

    An entry without an object is left out if it only groups other categories, as in Roboflow's files, or if its name is
    a duplicate.

    Args:
        categories: the list of the file.
        used: ids of categories with an object.

    Raises:
        ValueError: a category is invalid, or two categories with objects have the same name.
    """
    parsed: list[tuple[int, str, Any]] = []
    for category in categories:
        number = as_integer(category.get("id")) if isinstance(category, dict) else None
        if number is None or category.get("name") is None:
            raise ValueError(f"category {json.dumps(category)[:60]} has no integer 'id' or no 'name'")
        parsed.append((number, str(category["name"]), category.get("supercategory")))
    groups = {str(group) for _, name, group in parsed if group != name}
    names: dict[int, str] = {}
    notes: list[str] = []
    # Categories with objects come first, so that an unused one with the same name is the one that is left out.
    for number, name, _ in sorted(parsed, key=lambda entry: (entry[0] not in used, entry[0])):
        if names.get(number) == name:
            continue
        is_group, is_taken = name in groups, name in names.values()
        if number not in used and (is_group or is_taken):
            why = "is the group of others" if is_group else "another one has its name"
            notes.append(f"category {number} '{name}' is left out: it has no object and {why}")
        elif number in names or is_taken:
            raise ValueError(f"category {number} ('{name}') has the id or the name of another category")
        else:
            names[number] = name
    if not names:
        raise ValueError("has no category")
    first_with: dict[str, str] = {}
    for name in names.values():
        other = first_with.setdefault(" ".join(name.lower().split()), name)
        if other != name:
            notes.append(f"the categories '{other}' and '{name}' differ only in case or spaces")
    return dict(sorted(names.items())), notes


# ---------------------------------------------------------------------------------------------------------------- masks

OUTSIDE = "objects outside their image"
"""The reason under which such objects are counted."""


def decode_masks(segments: Sequence[bytes], height: int, width: int) -> Tensor:
    """Decode masks from their JSON: uint8 (n, height, width), 1 inside."""
    from pycocotools import mask as coco

    if not segments:
        return torch.zeros(0, height, width, dtype=torch.uint8)
    runs = [_run_lengths(json.loads(segment), height, width) for segment in segments]
    return torch.from_numpy(np.ascontiguousarray(coco.decode(runs).transpose(2, 0, 1)))


def segment_area(segment: Any, height: int, width: int) -> float:
    """Return the number of pixels inside a mask."""
    from pycocotools import mask as coco

    return float(coco.area(_run_lengths(segment, height, width)))


def _run_lengths(segment: Any, height: int, width: int) -> Any:
    """Convert polygons or uncompressed run lengths to compressed run lengths, and return compressed ones unchanged."""
    from pycocotools import mask as coco

    if isinstance(segment, list):
        return coco.merge(coco.frPyObjects(segment, height, width))
    return coco.frPyObjects(segment, height, width) if isinstance(segment["counts"], list) else segment


def encode_segment(segment: Any) -> bytes:
    """Encode a mask as JSON, which `decode_masks` reads."""
    return json.dumps(segment, separators=(",", ":")).encode()


def mask_box(segment: Any, height: int, width: int) -> list[float]:
    """Return x, y, width and height of the smallest box around a mask."""
    from pycocotools import mask as coco

    box: list[float] = coco.toBbox(_run_lengths(segment, height, width)).tolist()
    return box


def clean_segment(segment: Any, height: int, width: int) -> tuple[Any, bool, int]:
    """Check a mask, and bring it into the form that pycocotools reads.

    Returns:
        the mask, as a list of polygons or as run lengths; whether it lies completely inside its image; and the number
        of polygons that are left out because they have fewer than three points.

    Raises:
        UnusableError: the mask is missing or invalid, is empty, or lies completely outside its image.
    """
    if not segment:
        raise UnusableError("has no 'segmentation', although other objects have one (--no-masks reads the boxes alone)")
    if isinstance(segment, dict):
        return _clean_run_lengths(segment, height, width), True, 0
    if not isinstance(segment, list):
        raise UnusableError("has a 'segmentation' that is neither polygons nor run lengths")
    polygons = [_numbers(polygon) for polygon in _nested(segment)]
    kept = [polygon for polygon in polygons if len(polygon) >= 6]
    if not kept:
        raise UnusableError(f"has a polygon of {len(polygons[0])} numbers: a polygon needs three or more pairs")
    num_overlapping = num_inside = 0
    for polygon in kept:
        if max(map(abs, polygon)) > 10 * max(width, height):  # pycocotools' memory grows with the coordinates
            raise UnusableError("has a polygon far outside its image", OUTSIDE)
        left, top, right, bottom = min(polygon[::2]), min(polygon[1::2]), max(polygon[::2]), max(polygon[1::2])
        num_overlapping += left < width and top < height and right > 0 and bottom > 0
        num_inside += left >= -0.01 and top >= -0.01 and right <= width + 0.01 and bottom <= height + 0.01
    if not num_overlapping:
        raise UnusableError(f"has polygons outside the {format_size((height, width))} pixels of its image", OUTSIDE)
    return kept, num_inside == len(kept), len(polygons) - len(kept)


def _nested(segment: list[Any]) -> list[Any]:
    """Return a list of polygons; a single polygon may be a list of numbers or of points, polygons lists of points."""
    if not isinstance(segment[0], list):
        return [segment]
    if len(segment) >= 3 and all(_is_point(item) for item in segment):
        segment = [segment]
    return [
        [value for point in polygon for value in point]
        if isinstance(polygon, list) and polygon and all(map(_is_point, polygon))
        else polygon
        for polygon in segment
    ]


def _is_point(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and not isinstance(item[0], list)


def _numbers(polygon: Any) -> list[float]:
    """Return the coordinates of a polygon. Raises UnusableError."""
    if not isinstance(polygon, list) or len(polygon) % 2:
        count = len(polygon) if isinstance(polygon, list) else 0
        raise UnusableError(f"has a polygon of {count} numbers: a polygon needs three or more pairs")
    # COCO has 60 million coordinates, so the usual case is checked without a call for each.
    if {*map(type, polygon)} <= {int, float} and math.isfinite(sum(polygon)):
        return polygon
    numbers = [number for value in polygon if (number := as_number(value)) is not None]
    if len(numbers) < len(polygon):
        raise UnusableError("has a polygon with a value that is not a number")
    return numbers


def _clean_run_lengths(segment: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Raise UnusableError unless the run lengths cover the image exactly; pycocotools does not check this."""
    size, counts = segment.get("size"), segment.get("counts")
    if not isinstance(size, list) or [as_integer(side) for side in size] != [height, width]:
        raise UnusableError(f"has run lengths of size {size}, but its image has [{height}, {width}]")
    try:
        runs = run_lengths(counts)
    except ValueError:
        runs = np.array([-1])
    if (runs < 0).any() or int(runs.sum()) != height * width:
        raise UnusableError(
            f"has run lengths that do not add up to the {format_size((height, width))} pixels of its image"
        )
    if not runs[1::2].any():
        raise UnusableError("has a mask without a pixel", "objects with an empty mask")
    return {"size": [height, width], "counts": counts if isinstance(counts, str) else runs.tolist()}


def run_lengths(counts: Any) -> Integers:
    """Return run lengths, compressed or as a list, as an array. Raises ValueError."""
    if isinstance(counts, str):
        return decompress(counts)
    numbers = [as_integer(value) for value in counts] if isinstance(counts, list) else []
    return np.array([-1 if number is None else number for number in numbers], np.int64)


def runs_box(runs: Integers, height: int, width: int, *, by_rows: bool = False) -> tuple[int, int, int, int]:
    """Return x, y, width and height of the box around a mask of run lengths, read by columns (as COCO's) or by rows."""
    side = width if by_rows else height
    ends = np.cumsum(runs)
    start, last = (ends - runs)[1::2], ends[1::2] - 1
    start, last = start[last >= start], last[last >= start]
    if not len(start):
        return 0, 0, 0, 0
    major, length = int(start[0]) // side, int(last[-1]) // side - int(start[0]) // side + 1
    is_whole = bool((start // side != last // side).any())  # a run continues in the next row or column
    minor = 0 if is_whole else int((start % side).min())
    extent = side if is_whole else int((last % side).max()) - minor + 1
    return (minor, major, extent, length) if by_rows else (major, minor, length, extent)


def decompress(text: str) -> Integers:
    """Decode run lengths from COCO's compressed text.

    A character c stands for the six bits of c - 48: the lower five bits belong to a number, and the sixth bit is set if
    the number continues with the next character. From the third number on, each number is the difference between its
    run length and the run length two places before.

    Raises:
        ValueError: the text is not valid.
    """
    digits = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) - 48
    if not digits.size or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise ValueError("not valid compressed run lengths")
    is_last = (digits & 32) == 0
    number = np.cumsum(is_last) - is_last  # index of the number that each digit belongs to
    first = np.flatnonzero(np.r_[True, is_last[:-1]])
    exponent = np.arange(digits.size) - first[number]
    if exponent.max() > 9:
        raise ValueError("not valid compressed run lengths")
    values = np.bincount(number, weights=(digits & 31) * 32.0**exponent).astype(np.int64)
    is_negative = (digits[is_last] & 16) > 0
    values -= np.where(is_negative, 32 ** (exponent[is_last] + 1), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values
