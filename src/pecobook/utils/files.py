"""Files that survive a power cut: a file appears under its name either complete or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write `data` or its parts under a temporary name in the same folder, flush to disk, and rename to `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, completely or not at all."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def without_folders(text: str) -> str:
    """Return the last part of a path, or of several separated by commas, for text that leaves this machine.

    Names on the hub and in timm and torchvision, and JSON, are unchanged.
    """
    prefix, colon, location = text.partition(":")
    if prefix in ("dalle", "diffusers"):
        return f"{prefix}{colon}{without_folders(location)}"
    if text.startswith(("hf:", "timm:", "torchvision:", "{", "[")):
        return text
    return ",".join(part.rstrip("/\\").replace("\\", "/").rpartition("/")[2] for part in text.split(","))


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in the folder survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
