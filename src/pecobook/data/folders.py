"""Opens a folder as a source: a folder of images, of parquet files or of tar shards.

A folder of a million files must open in seconds, so `walk` reads only the file names. They are stored as one Arrow
column, which takes 8 bytes plus the letters of a name instead of a Python object, and which forked workers share
instead of copying.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pecobook.data.decode import read_file
from pecobook.data.layout import Folder, Layout, count_unused, parts_of, read_layout
from pecobook.data.mapped import mapped
from pecobook.data.names import (
    BESIDE_ITS_IMAGE,
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    is_hidden,
    masks_among,
    refuse_folder,
)
from pecobook.data.parts import Contents
from pecobook.data.source import Integers, Note, Store, arrow_binary, arrow_integers
from pecobook.errors import DataError, some_of
from pecobook.utils.distributed import made_by_first_rank

_CHUNK = 65_536
_REMEDIES = {
    "hidden": "; names that begin with a dot are not read, so rename these files or folders",
    "no extension": "; give the files an extension such as .png",
    "broken link": "; the links lead to nothing on this machine",
    **dict.fromkeys(
        (f"extension .{name}" for name in ("zip", "gz", "tgz", "bz2", "xz", "7z", "rar", "zst")), "; unpack them"
    ),
    **dict.fromkeys(
        (f"extension .{name}" for name in VIDEO_EXTENSIONS), "; pecobook finetune --clip.frames 8 reads videos"
    ),
}
"""Reason why files are left out -> what to do if there is nothing else."""
_FILE, _FOLDER, _LINKED_FOLDER = range(3)


class FileStore(Store):
    """Image files under one folder, as relative paths in an Arrow column."""

    def __init__(self, root: Path, paths: Any) -> None:
        self.root = root
        self._prefix = os.fsencode(root / "x")[:-1]
        self._paths = mapped(paths)  # Arrow's binary values, because names may not be UTF-8

    def __len__(self) -> int:
        return len(self._paths)

    def identify(self, row: int) -> str:
        """Return the path as text that can be printed and logged, even if it is not valid Unicode."""
        return os.fsencode(self.file(row)).decode(errors="replace")

    def file(self, row: int) -> Path:
        """Return the path of the file of a row."""
        return self.root / os.fsdecode(self._paths[row].as_py())

    def encoded(self, row: int) -> bytes:
        """Return the bytes of the image file of a row. Raises BadImage."""
        return read_file(self._prefix + self._paths[row].as_py())

    def files(self, rows: Integers) -> Iterator[bytes]:
        """Yield the paths of the files of the rows."""
        for paths in self._names(rows):
            yield from (self._prefix + path for path in paths)

    def digest(self, rows: Integers) -> str:
        """Return a hash of the relative paths. It does not include bytes: a good file may replace a damaged one."""
        digest = hashlib.sha256()
        for paths in self._names(rows):
            digest.update(b"\0".join(paths) + b"\0")
        return digest.hexdigest()

    def _names(self, rows: Integers) -> Iterator[list[bytes]]:
        """Yield the relative paths of the rows, a few at a time."""
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK]
            first = int(part.min())
            near = self._paths[first : int(part.max()) + 1]  # `take` copies everything it selects from
            yield near.take(arrow_integers(part - first)).to_pylist()


@dataclass
class ImageNames:
    """The names of image files.

    Attributes:
        chunks: relative paths, as Arrow arrays of at most `_CHUNK` rows.
        group_of: for each image, the index of its folder in `groups`, in four bytes.
        groups: the folders that contain images, as names from the top downwards.
    """

    chunks: list[Any] = field(default_factory=list)
    group_of: array[int] = field(default_factory=lambda: array("i"))
    groups: list[Folder] = field(default_factory=list)
    _names: list[bytes] = field(default_factory=list)

    def add(self, path: bytes, group: Folder) -> None:
        """Add a file of a folder; the files of a folder come one after another."""
        if not self.groups or self.groups[-1] is not group:
            self.groups.append(group)
        self._names.append(path)
        self.group_of.append(len(self.groups) - 1)
        if len(self._names) == _CHUNK:
            self.finish()

    def holds(self, group: Folder) -> bool:
        """Return whether `group` is the folder whose files were added last."""
        return bool(self.groups) and self.groups[-1] is group

    def finish(self) -> None:
        """Complete the last chunk."""
        if self._names:
            self.chunks.append(arrow_binary(self._names))
            self._names = []


@dataclass
class Listing(ImageNames):
    """The files below a folder: the names of the images, and what else there is.

    Attributes:
        tables: parquet files.
        shards: tar files.
        left_out: why other files and folders are not used, and how many there are.
        without_images: the folders that contain neither an image nor a folder.
    """

    tables: list[Path] = field(default_factory=list)
    shards: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    without_images: list[Folder] = field(default_factory=list)


def folder_contents(source: str, root: Path) -> Contents:
    """Return the splits of a folder of images, parquet files or tar shards.

    The most frequent of the three kinds of file is used; images win a tie, unless parquet files have a column `image`
    with as many rows as there are image files.

    Files are ordered by name, the files of a folder before its subfolders, and links to folders come last. The names of
    folders declare splits and classes; layout.py states the rules. A single folder, such as "images", is not a class.

    Raises:
        DataError: the folder holds no readable file, or it is unclear whether folders are splits or classes.
    """
    listing = made_by_first_rank(f"listing of {root}", lambda: walk(root))
    counts = {"image": len(listing.group_of), "tar": len(listing.shards), "parquet": len(listing.tables)}
    weights = dict(counts)
    num_rows, has_paths = _count_rows(listing.tables) if counts["image"] and listing.tables else (0, False)
    if num_rows >= counts["image"]:
        weights["image"] = 0
    kind = max(weights, key=lambda name: weights[name])  # a table next to each shard is the shard's metadata
    left_out = Counter(listing.left_out)  # the listing may be used again
    for other, count in counts.items():
        if other != kind and count and not (other == "image" and has_paths):
            left_out[f"{other} file beside {kind} files"] += count
    if counts[kind] == 0:
        raise DataError(
            f"--data '{source}': neither this folder nor its subfolders hold images{_seen_instead(left_out)}. "
            f"Supported extensions: {', '.join(IMAGE_EXTENSIONS)}; also parquet and tar files."
        )
    if kind != "image":
        from pecobook.data.shards import shard_contents
        from pecobook.data.tables import parquet_contents

        is_tar = kind == "tar"
        found = (
            shard_contents(source, listing.shards, root) if is_tar else parquet_contents(source, listing.tables, root)
        )
        return replace(found, left_out=dict(left_out + Counter(found.left_out)))
    import pyarrow as pa

    store = FileStore(root, pa.chunked_array(listing.chunks))
    layout = read_layout(source, listing.groups)
    group_of = np.frombuffer(listing.group_of, dtype=np.intc)
    left_out += count_unused(layout, group_of)
    notes = (*layout.notes, *_note_on_empty_classes(layout, listing))
    return Contents(parts_of(layout, store, group_of), dict(left_out), notes)


def _count_rows(tables: list[Path]) -> tuple[int, bool]:
    """Return the number of rows of the parquet files that have images, and whether these are paths of image files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    num_rows, has_paths = 0, False
    for table in tables:
        with contextlib.suppress(OSError, pa.ArrowException):
            footer = pq.read_metadata(table)
            schema = footer.schema.to_arrow_schema()
            if "image" in schema.names:
                num_rows += footer.num_rows
                has_paths |= re.match("(large_)?string|dictionary", str(schema.field("image").type)) is not None
    return num_rows, has_paths


def _seen_instead(left_out: Counter[str]) -> str:
    if not left_out:
        return ""
    ((first, _), *_) = seen = left_out.most_common(3)
    return f" (there are: {', '.join(f'{n:,} {reason}' for reason, n in seen)}){_REMEDIES.get(first, '')}"


def walk(root: Path, extensions: Sequence[str] = IMAGE_EXTENSIONS) -> Listing:
    """List a folder and its subfolders by file names alone, without opening a file or reading its size.

    Links to files count as files. Links to folders are followed after all other folders, unless the folder was already
    listed, so a circle of links ends. Files with one of the `extensions` count as images. Arrays (.npy) are images only
    if there are no others, because next to images they mostly contain masks or features.
    """
    listing, arrays, wanted = Listing(), ImageNames(), {extension.encode() for extension in extensions}
    top = os.fsencode(root)
    # relative paths with a final slash, and the same as names
    stack: list[tuple[bytes, Folder]] = [(b"", ())]
    links: list[tuple[bytes, Folder]] = []
    listed: list[bytes] = []
    visited: set[tuple[int, int]] | None = None
    while stack or links:
        if not stack:
            stack.append(links.pop(0))
            # Only now, because most sources have no link to a folder.
            parents = map(os.fsencode, root.resolve().parents)
            visited = visited or {_identity(folder) for folder in (*parents, *(top + b"/" + f for f in listed))}
        folder, group = stack.pop()
        path = os.path.join(top, folder)  # noqa: PTH118 (bytes, a million times)
        if visited is None:
            listed.append(folder)
        elif (identity := _identity(path)) in visited:
            listing.left_out["link to a folder that is read already"] += 1
            continue
        else:
            visited.add(identity)
        subfolders: list[tuple[bytes, Folder]] = []
        num_links = len(links)
        files = _entries(path, listing.left_out)
        for kind, below in ((_FOLDER, subfolders), (_LINKED_FOLDER, links)):
            below += [(folder + name + b"/", (*group, os.fsdecode(name))) for name in files[kind]]
        masks = masks_among(names := files[_FILE])
        names.reverse()
        while names:  # each is freed once it is in the list: a folder may hold ten million
            name = names.pop()
            if name in masks:
                listing.left_out[BESIDE_ITS_IMAGE] += 1
                continue
            _, dot, extension = name.lower().rpartition(b".")
            if dot and extension in wanted:
                (arrays if extension == b"npy" else listing).add(folder + name, group)
            elif dot and extension == b"parquet":
                listing.tables.append(root / os.fsdecode(folder + name))
            elif dot and extension == b"tar":
                listing.shards.append(root / os.fsdecode(folder + name))
            else:
                listing.left_out[_reason_for_extension(extension if dot else b"")] += 1
        stack += reversed(subfolders)
        if not subfolders and len(links) == num_links and not (listing.holds(group) or arrays.holds(group)):
            listing.without_images.append(group)
    if listing.group_of and arrays.group_of:
        listing.left_out["extension .npy beside other images"] += len(arrays.group_of)
    elif arrays.group_of:
        arrays.finish()
        listing.chunks, listing.group_of, listing.groups = arrays.chunks, arrays.group_of, arrays.groups
    listing.finish()
    return listing


def _identity(folder: bytes) -> tuple[int, int]:
    try:
        status = os.stat(folder)  # noqa: PTH116 (bytes)
    except OSError as error:
        refuse_folder(error)
    return status.st_dev, status.st_ino


def _entries(folder: bytes, left_out: Counter[str]) -> dict[int, list[bytes]]:
    """Return the sorted names of the entries of a folder, by kind, and count what is left out."""
    found: dict[int, list[bytes]] = {kind: [] for kind in (_FILE, _FOLDER, _LINKED_FOLDER)}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if is_hidden(os.fsdecode(name)):
                    left_out["hidden"] += 1
                elif entry.is_file(follow_symlinks=False):
                    found[_FILE].append(name)
                elif entry.is_dir(follow_symlinks=False):
                    found[_FOLDER].append(name)
                elif (kind := _kind_of_link(entry)) is not None:
                    found[kind].append(name)
                else:
                    is_broken = entry.is_symlink() and not Path(os.fsdecode(entry.path)).exists()
                    left_out["broken link" if is_broken else "not a regular file"] += 1
    except OSError as error:
        refuse_folder(error)
    for names in found.values():
        names.sort()
    return found


def _kind_of_link(entry: os.DirEntry[bytes]) -> int | None:
    """Return what a link leads to; None if that is missing, or neither a file nor a folder."""
    try:
        return _LINKED_FOLDER if entry.is_dir() else _FILE if entry.is_file() else None
    except OSError:  # a link to itself
        return None


def _reason_for_extension(extension: bytes) -> str:
    if not extension:
        return "no extension"
    if len(extension) > 10 or extension.isdigit():
        return "other extension"
    return f"extension .{extension.decode(errors='replace')}"


def _note_on_empty_classes(layout: Layout, listing: Listing) -> list[str]:
    """Return a note that names the folders without an image next to class folders, if there are any."""
    named = zip(listing.groups, layout.class_of, strict=True)
    parents = {group[: group.index(name)] for group, name in named if name}
    empty = sorted("/".join(folder) for folder in listing.without_images if folder[:-1] in parents)
    if not empty:
        return []
    folders, what = f"{len(empty):,} folders beside the class folders", "hold no image, and are no classes"
    if len(empty) == 1:
        folders, what = "1 folder beside the class folders", "holds no image, and is no class"
    return [Note(f"{folders} {what}: {some_of(empty, 5)}.", "lost labels")]
