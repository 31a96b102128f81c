"""Guesses from names of files and folders what kind of data a folder holds."""

from __future__ import annotations

from pathlib import Path

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
    return "segment" if len(found.pairs) > len(found.unpaired) else "images"
