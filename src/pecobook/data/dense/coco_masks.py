"""Masks as COCO's format writes them: polygons, run lengths, compressed run lengths; checked, and decoded.

pycocotools trusts what it is given, down to reading past the end of a text, so everything is checked first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from pecobook.data.source import Integers


def decode_masks(segments: Sequence[bytes], height: int, width: int) -> Tensor:
    """Masks from their JSON: uint8 (n, height, width), 1 inside."""
    from pycocotools import mask as coco

    if not segments:
        return torch.zeros(0, height, width, dtype=torch.uint8)
    runs = [_run_lengths(json.loads(segment), height, width) for segment in segments]
    return torch.from_numpy(np.ascontiguousarray(coco.decode(runs).transpose(2, 0, 1)))


def segment_area(segment: Any, height: int, width: int) -> float:
    """Pixels inside a mask."""
    from pycocotools import mask as coco

    return float(coco.area(_run_lengths(segment, height, width)))


def _run_lengths(segment: Any, height: int, width: int) -> Any:
    """Compressed run lengths of polygons, of uncompressed run lengths or of themselves."""
    from pycocotools import mask as coco

    if isinstance(segment, list):
        return coco.merge(coco.frPyObjects(segment, height, width))
    return coco.frPyObjects(segment, height, width) if isinstance(segment["counts"], list) else segment


def encode(segment: Any) -> bytes:
    """A mask as JSON, what `decode_masks` reads."""
    return json.dumps(segment, separators=(",", ":")).encode()


def find_box(box: Any, segment: Any, height: int, width: int) -> tuple[float, float, float, float]:
    """x, y, width, height; from the mask where the box is missing. Raises ValueError."""
    if box is None and segment:
        from pycocotools import mask as coco

        box = coco.toBbox(_run_lengths(segment, height, width)).tolist()
    if not isinstance(box, list) or len(box) != 4 or not all(is_number(value) for value in box):
        raise ValueError(f"has no 'bbox' of four numbers, but {json.dumps(box)[:40]}")
    return (float(box[0]), float(box[1]), float(box[2]), float(box[3]))


def check_segment(segment: Any, height: int, width: int) -> bool:
    """Whether a mask lies wholly inside its image. Raises ValueError when it is none, or wholly outside."""
    if not segment:
        raise ValueError("has no 'segmentation', though others have")
    if isinstance(segment, dict):
        _check_run_lengths(segment, height, width)
        return True
    if not isinstance(segment, list):
        raise ValueError("has a 'segmentation' that is neither polygons nor run lengths")
    seen = inside = 0
    for polygon in segment:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            count = len(polygon) if isinstance(polygon, list) else 0
            raise ValueError(f"has a polygon of {count} numbers: it takes pairs, three or more")
        if not all(is_number(value) for value in polygon):
            raise ValueError("has a polygon with something that is no number")
        if max(map(abs, polygon)) > 10 * max(width, height):  # pycocotools' memory grows with it
            raise ValueError("has a polygon far outside its image")
        left, top, right, bottom = min(polygon[::2]), min(polygon[1::2]), max(polygon[::2]), max(polygon[1::2])
        seen += left < width and top < height and right > 0 and bottom > 0
        inside += left >= -0.01 and top >= -0.01 and right <= width + 0.01 and bottom <= height + 0.01
    if not seen:
        raise ValueError(f"has polygons outside the {shape_text((height, width))} pixels of its image")
    return inside == len(segment)


def _check_run_lengths(segment: dict[str, Any], height: int, width: int) -> None:
    """Raise ValueError unless run lengths fill exactly this image: pycocotools trusts them."""
    if segment.get("size") != [height, width]:
        raise ValueError(f"has run lengths of size {segment.get('size')}, not [{height}, {width}] as its image")
    counts = segment.get("counts")
    try:
        runs = decompress(counts) if isinstance(counts, str) else np.array(counts)
    except ValueError:
        runs = np.array(())
    whole = runs.ndim == 1 and np.issubdtype(runs.dtype, np.integer)
    if not whole or (runs < 0).any() or int(runs.sum()) != height * width:
        raise ValueError(f"has run lengths that do not add up to the {shape_text((height, width))} pixels of its image")


def decompress(text: str) -> Integers:
    """Run lengths from COCO's text: five bits a character, the sixth says that more follow, from 48 on.

    From the third on, each is the difference to the one before the last. Raises ValueError.
    """
    letters = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) - 48
    if not letters.size or letters.min() < 0 or letters.max() > 63 or letters[-1] & 32:
        raise ValueError("no compressed run lengths")
    last = (letters & 32) == 0
    number = np.cumsum(last) - last  # which number each letter belongs to
    first = np.flatnonzero(np.r_[True, last[:-1]])
    place = np.arange(letters.size) - first[number]
    if place.max() > 9:
        raise ValueError("no compressed run lengths")
    values = np.bincount(number, weights=(letters & 31) * 32.0**place).astype(np.int64)
    negative = (letters[last] & 16) > 0
    values -= np.where(negative, 32 ** (place[last] + 1), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value from JSON is a whole number of 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value from JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shape_text(size: Sequence[Any]) -> str:
    """Height and width as people write them."""
    return f"{size[1]} x {size[0]}"
