"""Guesses from names of files and folders what kind of data a folder holds."""

from __future__ import annotations

from pathlib import Path

from pecobook.data.decode import open_image
from pecobook.data.dense.coco_files import find_annotations, looks_like_coco
from pecobook.data.dense.segmentation_pairs import find_pairs
from pecobook.errors import DataError


def layout_of(data: str) -> str:
    """Return "detect" or "segment" for a folder in one of their layouts, and otherwise "images"."""
    root = Path(data).expanduser()
    if not data or not root.is_dir():
        return "images"
    try:
        if any(looks_like_coco(file) for files in find_annotations(root).values() for file, _ in files):
            return "detect"
        found = find_pairs(data, root)
    except (DataError, OSError):
        return "images"
    is_usual = len(found.pairs) > len(found.unpaired) and not _is_photograph(root / found.pairs[0][1])
    return "segment" if is_usual else "images"


def _is_photograph(mask: Path) -> bool:
    """Return whether a file is a JPEG in colour, so that "mask" is the name of a class of photographs."""
    try:
        with open_image(mask) as picture:
            return picture.format == "JPEG" and picture.mode == "RGB"
    except Exception:  # a header of arbitrary bytes may raise any exception
        return False
