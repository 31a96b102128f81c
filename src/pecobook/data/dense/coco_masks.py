"""Checks and decodes masks in COCO's format: polygons, run lengths, and compressed run lengths.

pycocotools does not validate its input and may read past the end of a text, so masks are checked before they reach it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from pecobook.data.source import Integers
from pecobook.utils.numbers import is_number


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


def parse_box(box: Any, segment: Any, height: int, width: int) -> tuple[float, float, float, float]:
    """Return x, y, width and height of a box, computed from the mask if the box is missing. Raises ValueError."""
    if box is None and segment:
        from pycocotools import mask as coco

        box = coco.toBbox(_run_lengths(segment, height, width)).tolist()
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(value) for value in box):
        raise ValueError(f"has a 'bbox' that is not four numbers: {json.dumps(box)[:40]}")
    return (float(box[0]), float(box[1]), float(box[2]), float(box[3]))


def check_segment(segment: Any, height: int, width: int) -> bool:
    """Return whether a mask lies completely inside its image.

    Raises:
        ValueError: the mask is missing or invalid, or lies completely outside its image.
    """
    if not segment:
        raise ValueError("has no 'segmentation', although other objects have one")
    if isinstance(segment, dict):
        _check_run_lengths(segment, height, width)
        return True
    if not isinstance(segment, list):
        raise ValueError("has a 'segmentation' that is neither polygons nor run lengths")
    num_overlapping = num_inside = 0
    for polygon in segment:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            count = len(polygon) if isinstance(polygon, list) else 0
            raise ValueError(f"has a polygon of {count} numbers: a polygon needs three or more pairs")
        if not all(is_number(value) for value in polygon):
            raise ValueError("has a polygon with a value that is not a number")
        if max(map(abs, polygon)) > 10 * max(width, height):  # pycocotools' memory grows with the coordinates
            raise ValueError("has a polygon far outside its image")
        left, top, right, bottom = min(polygon[::2]), min(polygon[1::2]), max(polygon[::2]), max(polygon[1::2])
        num_overlapping += left < width and top < height and right > 0 and bottom > 0
        num_inside += left >= -0.01 and top >= -0.01 and right <= width + 0.01 and bottom <= height + 0.01
    if not num_overlapping:
        raise ValueError(f"has polygons outside the {format_size((height, width))} pixels of its image")
    return num_inside == len(segment)


def _check_run_lengths(segment: dict[str, Any], height: int, width: int) -> None:
    """Raise ValueError unless the run lengths cover the image exactly; pycocotools does not check this."""
    if segment.get("size") != [height, width]:
        raise ValueError(f"has run lengths of size {segment.get('size')}, but its image has [{height}, {width}]")
    counts = segment.get("counts")
    try:
        runs = decompress(counts) if isinstance(counts, str) else np.array(counts)
    except ValueError:
        runs = np.array(())
    are_integers = runs.ndim == 1 and np.issubdtype(runs.dtype, np.integer)
    if not are_integers or (runs < 0).any() or int(runs.sum()) != height * width:
        raise ValueError(
            f"has run lengths that do not add up to the {format_size((height, width))} pixels of its image"
        )


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


def is_integer(value: Any) -> TypeGuard[int]:
    """Return whether a JSON value is an integer that fits into 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def format_size(size: Sequence[Any]) -> str:
    """Format height and width as "width x height"."""
    return f"{size[1]} x {size[0]}"
