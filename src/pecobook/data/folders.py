"""Opens a folder as a source: a folder of images, of parquet files or of tar shards.

A folder of a million files must open in seconds, so `walk` reads only the names of files. The names are stored as one
Arrow column, which takes 60 bytes per image instead of one Python object, and which forked workers share instead of
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

from pecobook.data.decode import Range, decode, read_file
from pecobook.data.source import IMAGE_EXTENSIONS, Integers, Labels, Part
from pecobook.errors import DataError

_EXTENSIONS = frozenset(extension.encode() for extension in IMAGE_EXTENSIONS)
_CHUNK = 65_536
# Only these folder names declare a split; for the names of parquet files and shards, `split_from_name` is less strict.
_SPLIT_FOLDERS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}


class FileStore:
    """Image files under one folder, as relative paths in an Arrow column."""

    value_range: Range | None = None

    def __init__(self, root: Path, paths: Any) -> None:
        self.root = root
        self._paths = paths  # datasets.Dataset with the binary column "path", because names may not be UTF-8

    def __len__(self) -> int:
        return len(self._paths)

    def identify(self, row: int) -> str:
        """Return the path as text that can be printed and logged, even if the path is not valid Unicode."""
        return os.fsencode(self._path(row)).decode(errors="replace")

    def _path(self, row: int) -> Path:
        return self.root / os.fsdecode(self._paths[row]["path"])

    def read(self, row: int) -> Tensor:
        """Read and decode the image of a row: uint8 (3, H, W)."""
        path = self._path(row)
        name = os.fsencode(path).decode(errors="replace")
        return decode(read_file(path, name), name=name, value_range=self.value_range)

    def digest(self, rows: Integers) -> str:
        """Return a hash of the relative paths."""
        column = self._paths.data.column("path")
        digest = hashlib.sha256()
        for start in range(0, len(rows), _CHUNK):
            digest.update(b"\0".join(column.take(rows[start : start + _CHUNK]).to_pylist()) + b"\0")
        return digest.hexdigest()


@dataclass
class Listing:
    """The files below a folder.

    Attributes:
        chunks: relative paths of the images, as Arrow data sets of at most `_CHUNK` rows.
        group_of: for each image, the index of its group in `groups`.
        groups: the distinct first two folders of the relative paths (fewer for an image at a higher level).
        tables: parquet files.
        shards: tar files.
    """

    chunks: list[Any] = field(default_factory=list)
    group_of: array[int] = field(default_factory=lambda: array("q"))
    groups: list[tuple[str, ...]] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    shards: list[Path] = field(default_factory=list)


def folder_parts(source: str, root: Path) -> dict[str, Part]:
    """Return the splits of a folder of images, parquet files or tar shards.

    The most frequent of the three kinds of file is used; images win a tie.

    Hidden files and folders (with a leading dot) are ignored, and symbolic links to folders are not followed. Files are
    ordered by name, the files of a folder before its subfolders. Class folders give labels if every image lies in a
    class folder and there are at least two classes; a single folder, such as "images", is not a class.

    Splits need a top level with `train/` and one of `val/`, `validation/` and `test/`; other files and folders at the
    top level are then not used. Every class of the evaluation split must exist in training.

    Raises:
        DataError: the folder holds no readable file, or a class is missing in training.
    """
    listing = walk(root)
    num_images = len(listing.group_of)
    if num_images < max(len(listing.shards), len(listing.tables)):
        if len(listing.shards) >= len(listing.tables):  # a table next to each shard is the shard's metadata
            from pecobook.data.shards import shard_parts

            return shard_parts(source, listing.shards, root=root)
        from pecobook.data.tables import parquet_parts

        return parquet_parts(source, listing.tables, root=root)
    if num_images == 0:
        raise DataError(
            f"--data '{source}': neither this folder nor its subfolders hold images. Supported extensions: "
            f"{', '.join(IMAGE_EXTENSIONS)}; also parquet and tar files."
        )
    from datasets import concatenate_datasets

    store = FileStore(root, concatenate_datasets(listing.chunks))
    return _parts(store, listing)


def walk(root: Path) -> Listing:
    """List a folder and its subfolders by file names alone, without opening a file or reading its size."""
    listing = Listing()
    names: list[bytes] = []
    # (relative path of the folder with a final slash, first two folders of that path)
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
                    group_number = len(listing.groups)
                    listing.groups.append(group)
                names.append(folder + name)
                listing.group_of.append(group_number)
                if len(names) == _CHUNK:
                    listing.chunks.append(_to_arrow(names))
                    names = []
            elif extension == b"parquet":
                listing.tables.append(root / os.fsdecode(folder + name))
            elif extension == b"tar":
                listing.shards.append(root / os.fsdecode(folder + name))
        stack += reversed(subfolders)
    if names:
        listing.chunks.append(_to_arrow(names))
    return listing


def _entries(folder: bytes) -> list[tuple[bytes, bool]]:
    """Return (name, whether it is a folder) of each entry of a folder that is not hidden, sorted by name."""
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

    # large_binary, because the paths of many millions of files exceed 2 GiB in total.
    return Dataset.from_dict({"path": names}, features=Features({"path": Value("large_binary")}))


def _parts(store: FileStore, listing: Listing) -> dict[str, Part]:
    group_of = np.frombuffer(listing.group_of, dtype=np.int64)
    split_of_group = _splits(listing.groups)
    if split_of_group is None:
        split_of_group, depth = ["train"] * len(listing.groups), 0
    else:
        depth = 1
    class_of_group = [group[depth] if len(group) > depth else None for group in listing.groups]
    parts = {}
    for split in sorted({name for name in split_of_group if name}):
        in_split = np.array([name == split for name in split_of_group])
        rows = np.flatnonzero(in_split[group_of])
        parts[split] = Part(store, rows, _labels(class_of_group, in_split, group_of[rows]))
    if "train" in parts and _is_unlabelled(parts["train"].labels):
        parts["train"] = Part(store, parts["train"].rows, None)
    return parts


def _splits(groups: list[tuple[str, ...]]) -> list[str] | None:
    """Return the split of each group ("" for no split), or None if the top level declares no splits."""
    names = [_SPLIT_FOLDERS.get(group[0].lower(), "") if group else "" for group in groups]
    if "train" not in names or (set(names) == {"train", ""}):
        # A single folder `train/` is the training set; among other folders it may be a class of railway pictures.
        return names if set(names) == {"train"} else None
    return names


def _is_unlabelled(labels: Labels | None) -> bool:
    return labels is None or len(labels.names) < 2


def _labels(class_of_group: list[str | None], in_split: Any, group_of: Integers) -> Labels | None:
    """Number the class folders of one split; return None if an image of the split lies outside all class folders.

    Args:
        class_of_group: the class folder of each group, or None.
        in_split: bool (number of groups,), whether a group belongs to the split.
        group_of: the group of each image of the split.
    """
    used = [name for name, is_used in zip(class_of_group, in_split, strict=True) if is_used]
    if None in used:
        return None
    names = tuple(sorted({name for name in used if name is not None}))
    number = {name: code for code, name in enumerate(names)}
    table = np.array([number.get(name, -1) if name else -1 for name in class_of_group], dtype=np.int64)
    return Labels(table[group_of], names)
