"""A folder as a source: its images, or else the parquet files or the tar shards that it holds.

A million files must start in seconds, so the walk asks nothing of a file but its name, and the names are kept
as one Arrow column: 60 bytes an image instead of a Python object each, which forked workers share instead of
copying.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pecobook.data.decode import BadImage, decode
from pecobook.data.source import IMAGE_EXTENSIONS, Integers, Labels, Part
from pecobook.errors import DataError

_EXTENSIONS = frozenset(extension.encode() for extension in IMAGE_EXTENSIONS)
_CHUNK = 65_536
# Exactly these folder names declare a split; the same words in parquet and shard names are read more
# generously.
_SPLIT_FOLDERS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


class FileStore:
    """Image files under one folder, as relative paths in an Arrow column."""

    def __init__(self, root: Path, paths: Any) -> None:
        self.root = root
        self._paths = paths  # datasets.Dataset with the binary column "path": names need not be UTF-8

    def __len__(self) -> int:
        return len(self._paths)

    def identify(self, row: int) -> str:
        """The path, as text that can be printed and logged even when its name is no Unicode."""
        return os.fsencode(self._path(row)).decode(errors="replace")

    def _path(self, row: int) -> Path:
        return self.root / os.fsdecode(self._paths[row]["path"])

    def read(self, row: int) -> Tensor:
        """The image, uint8 (3, H, W)."""
        path = self._path(row)
        name = os.fsencode(path).decode(errors="replace")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadImage(name, error.strerror or str(error)) from error
        return decode(data, name=name)

    def digest(self, rows: Integers) -> str:
        """A hash of the relative paths."""
        column = self._paths.data.column("path")
        digest = hashlib.sha256()
        for start in range(0, len(rows), _CHUNK):
            digest.update(b"\0".join(column.take(rows[start : start + _CHUNK]).to_pylist()) + b"\0")
        return digest.hexdigest()


@dataclass
class Listing:
    """What a walk found.

    Attributes:
        chunks: relative paths of images, as Arrow data sets of at most `_CHUNK` rows.
        group_of: for each image, its number in `groups`.
        groups: the first two folders of a relative path, fewer when the image lies higher.
        tables: parquet files.
        shards: tar files.
    """

    chunks: list[Any] = field(default_factory=list)
    group_of: array[int] = field(default_factory=lambda: array("q"))
    groups: list[tuple[str, ...]] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    shards: list[Path] = field(default_factory=list)


def folder_parts(source: str, root: Path) -> dict[str, Part]:
    """The splits of a folder of images, of parquet files or of tar shards, whichever files are most; images win a tie.

    Hidden files and folders (a leading dot) are left out, and folders behind symbolic links are not entered.
    Files come in the order of their names, those of a folder before its subfolders. Labels are given by class
    folders when every image lies in one and there are at least two; a single folder named "images" is no
    class.

    Splits need a top level of `train/` and one of `val/`, `validation/`, `test/`; what lies beside them is
    then not used. A class of the evaluation split must exist in training.

    Raises:
        DataError: nothing that can be read, or a class that is missing in training.
    """
    found = walk(root)
    images = len(found.group_of)
    if images < max(len(found.shards), len(found.tables)):
        if len(found.shards) >= len(found.tables):  # a table beside each shard is the shard's metadata
            from pecobook.data.shards import shard_parts

            return shard_parts(source, found.shards, root=root)
        from pecobook.data.tables import parquet_parts

        return parquet_parts(source, found.tables, root=root)
    if images == 0:
        raise DataError(
            f"--data '{source}': this folder holds no images, at no depth. Extensions that are read: "
            f"{', '.join(IMAGE_EXTENSIONS)}; also parquet and tar files."
        )
    from datasets import concatenate_datasets

    store = FileStore(root, concatenate_datasets(found.chunks))
    return _parts(store, found)


def walk(root: Path) -> Listing:
    """List a folder at any depth by names alone: no file is opened or asked for its size."""
    found = Listing()
    names: list[bytes] = []
    # (relative folder with its slash, first two folders)
    stack: list[tuple[bytes, tuple[str, ...]]] = [(b"", ())]
    top = os.fsencode(root)
    while stack:
        folder, group = stack.pop()
        subfolders = []
        group_number = -1
        for name, is_folder in _entries(os.path.join(top, folder)):  # noqa: PTH118 (bytes, a million times)
            if is_folder:
                subfolders.append((folder + name + b"/", (*group, os.fsdecode(name))[:2]))
                continue
            stem, _, extension = name.lower().rpartition(b".")
            if not stem:
                continue
            if extension in _EXTENSIONS:
                if group_number < 0:
                    group_number = len(found.groups)
                    found.groups.append(group)
                names.append(folder + name)
                found.group_of.append(group_number)
                if len(names) == _CHUNK:
                    found.chunks.append(_to_arrow(names))
                    names = []
            elif extension == b"parquet":
                found.tables.append(root / os.fsdecode(folder + name))
            elif extension == b"tar":
                found.shards.append(root / os.fsdecode(folder + name))
        stack += reversed(subfolders)
    if names:
        found.chunks.append(_to_arrow(names))
    return found


def _entries(folder: bytes) -> list[tuple[bytes, bool]]:
    """(name, whether it is a folder) of what is not hidden, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                (entry.name, entry.is_dir(follow_symlinks=False))
                for entry in entries
                if not entry.name.startswith(b".")
            )
    except OSError as error:
        raise DataError(f"The folder '{os.fsdecode(folder)}' cannot be listed: {error.strerror}.") from error


def _to_arrow(names: list[bytes]) -> Any:
    from datasets import Dataset, Features, Value

    # large_binary, because the paths of many million files are together longer than 2 GiB.
    return Dataset.from_dict({"path": names}, features=Features({"path": Value("large_binary")}))


def _parts(store: FileStore, found: Listing) -> dict[str, Part]:
    group_of = np.frombuffer(found.group_of, dtype=np.int64)
    split_of_group = _splits(found.groups)
    if split_of_group is None:
        split_of_group, depth = ["train"] * len(found.groups), 0
    else:
        depth = 1
    class_of_group = [group[depth] if len(group) > depth else None for group in found.groups]
    parts = {}
    for split in sorted({name for name in split_of_group if name}):
        mine = np.array([name == split for name in split_of_group])
        rows = np.flatnonzero(mine[group_of])
        parts[split] = Part(store, rows, _labels(class_of_group, mine, group_of[rows]))
    if "train" in parts and _is_unlabelled(parts["train"].labels):
        parts["train"] = Part(store, parts["train"].rows, None)
    return parts


def _splits(groups: list[tuple[str, ...]]) -> list[str] | None:
    """The split of each group ("" for none), or None when the top level declares no splits."""
    names = [_SPLIT_FOLDERS.get(group[0].lower(), "") if group else "" for group in groups]
    if "train" not in names or (set(names) == {"train", ""}):
        # `train/` alone is the whole training set; among other folders it may be a class of railway pictures.
        return names if set(names) == {"train"} else None
    return names


def _is_unlabelled(labels: Labels | None) -> bool:
    return labels is None or len(labels.names) < 2


def _labels(class_of_group: list[str | None], mine: Any, group_of: Integers) -> Labels | None:
    """Number the class folders of one split; None when an image of it lies outside of all of them."""
    used = [name for name, own in zip(class_of_group, mine, strict=True) if own]
    if None in used:
        return None
    names = tuple(sorted({name for name in used if name is not None}))
    number = {name: code for code, name in enumerate(names)}
    table = np.array([number.get(name, -1) if name else -1 for name in class_of_group], dtype=np.int64)
    return Labels(table[group_of], names)
