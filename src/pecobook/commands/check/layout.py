"""Guesses from names of files and folders what kind of data a folder holds."""

from __future__ import annotations

from pathlib import Path

_IMAGE_FOLDERS = {"images", "image", "img", "imgs", "jpegimages"}
_MASK_FOLDERS = {"masks", "mask", "annotations", "labels", "label", "segmentationclass"}


def layout_of(data: str) -> str:
    """Return "detect" or "segment" for a folder in one of their layouts, and otherwise "images"."""
    root = Path(data).expanduser()
    if not data or not root.is_dir():
        return "images"
    folders = [root, *_subfolders(root)]
    if any(_has_objects(folder) for folder in folders):
        return "detect"
    for folder in folders:
        names = {path.name.lower() for path in _subfolders(folder)}
        if names & _IMAGE_FOLDERS and names & _MASK_FOLDERS:
            return "segment"
    return "images"


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))[:1000]
    except OSError:
        return []


def _has_objects(folder: Path) -> bool:
    """Return whether a folder holds a JSON file whose beginning looks like COCO's format."""
    for file in sorted(folder.glob("*.json"))[:20]:
        try:
            with file.open("rb") as stream:
                start = stream.read(4096)
        except OSError:
            continue
        if any(word in start for word in (b'"images"', b'"annotations"', b'"categories"')):
            return True
    return False
