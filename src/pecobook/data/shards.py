"""Reads images from tar shards (WebDataset) in any order.

The headers of all members are read once. The resulting index, which lists the shard, the offset and the size of each
image, is stored as a parquet file in the cache folder. One `os.pread` then reads an image, so shards need neither
unpacking nor a shuffle buffer.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pecobook.data.decode import BadImage, check_bytes
from pecobook.data.layout import Layout, count_unused, parts_of, read_layout
from pecobook.data.mapped import mapped
from pecobook.data.names import IMAGE_EXTENSIONS, group_by_split, note_ignored_splits
from pecobook.data.parts import Contents, Labels, Part, distinct_values, encode_labels, first_and_count
from pecobook.data.remote import RemotePath
from pecobook.data.remote_cache import cache_folder
from pecobook.data.source import Integers, Note, Store, file_version, hash_some, relative_names
from pecobook.data.tar_index import index_shard
from pecobook.errors import DataError, first_line
from pecobook.utils.distributed import made_by_first_rank
from pecobook.utils.files import write_atomically

_INDEX_VERSION = 4  # a new number invalidates the cached indices
_MAX_NOTES = 5
_PART = 2**16  # rows that are hashed at a time
_THREADS = 8  # remote shards whose headers are read at once
_SAME_TIME = 2.0  # seconds; some file systems drop fractions of a second from file times
_MAX_OPEN = 256  # shards that each process keeps open; further shards are reopened for each image


class ShardStore(Store):
    """Images inside tar files.

    Args:
        shards: the tar files.
        index: Arrow table with the columns shard (number), member (name), offset and size (both in bytes).
    """

    def __init__(self, shards: list[Path], index: Any) -> None:
        self._shards = shards
        self._members = mapped(index.column("member").combine_chunks())
        self._shard, self._offset, self._size = (
            mapped(index.column(name).to_numpy()) for name in ("shard", "offset", "size")
        )
        # shard -> file descriptor; pread uses no file position, so forked processes may share the descriptor
        self._open: dict[int, int] = {}
        self._states: list[Any] = [None if isinstance(shard, RemotePath) else shard.stat() for shard in shards]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self._shard)

    def identify(self, row: int) -> str:
        """Return the shard's path, a slash, and the member's name."""
        return f"{self._shards[self._shard[row]]}/{self._members[row].as_py()}"

    def file(self, row: int) -> bytes:
        """Return the bytes of the member of a row. Raises BadImage."""
        name, size = self.identify(row), int(self._size[row])
        check_bytes(size, name)
        try:
            data = self._pread(int(self._shard[row]), size, int(self._offset[row]))
        except OSError as error:
            raise BadImage(name, error.strerror or str(error)) from error
        if len(data) < size:
            raise BadImage(name, f"the shard ends {size - len(data)} bytes too early")
        return data

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        path = self._shards[shard]
        if isinstance(path, RemotePath):
            return path.read_range(offset, size)
        descriptor, is_kept = self._open.get(shard), True
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY)
            is_kept = len(self._open) < _MAX_OPEN and self._open.setdefault(shard, descriptor) == descriptor
        try:
            data = os.pread(descriptor, size, offset)
            before, now = self._states[shard], os.fstat(descriptor)
        finally:
            if not is_kept:
                os.close(descriptor)
        is_other = now.st_size != before.st_size or abs(now.st_mtime - before.st_mtime) > _SAME_TIME
        if is_other and len(data) == size:
            raise OSError(errno.ESTALE, "the shard was written since it was opened: start the command again")
        return data

    def files(self, rows: Integers) -> list[bytes]:
        """Return the paths of the shards that hold the rows."""
        return [os.fsencode(self._shards[shard]) for shard in np.unique(self._shard[rows])]

    def digest(self, rows: Integers) -> str:
        """Return a hash of the shards' names, of the members' names, offsets and sizes, and of the bytes of some."""
        digest = hash_some(self.encoded, rows)
        digest.update(repr([shard.name for shard in self._shards]).encode())
        parts = [rows[start : start + _PART] for start in range(0, len(rows), _PART)]
        for column in (self._shard, self._offset, self._size):
            for part in parts:
                digest.update(column[part].astype("<i8").tobytes())
        for number, part in enumerate(parts):
            digest.update((b"\0" if number else b"") + "\0".join(self._members.take(part).to_pylist()).encode())
        return digest.hexdigest()


def shard_contents(source: str, shards: list[Path], root: Path | None = None) -> Contents:
    """Return the splits of tar files; tar_index.py says which members are images and labels.

    The names of the shards, and of their folders under `root`, declare splits, as for parquet files.

    Raises:
        DataError: a shard is not an uncompressed tar file, or no shard holds an image.
    """
    index = made_by_first_rank(f"index of {source}", lambda: _load_index(source, shards))
    left_out: dict[str, int]
    left_out, damage = (json.loads(index.schema.metadata[name]) for name in (b"left_out", b"notes"))
    notes: list[str] = [Note(text, "lost images") for text in damage]
    if len(index) == 0:
        seen = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        raise DataError(
            f"--data '{source}': no images in {len(shards)} tar files{f' (there are: {seen})' if seen else ''}. "
            f"Supported extensions: {', '.join(IMAGE_EXTENSIONS)}."
        )
    store = ShardStore(shards, index)
    names = relative_names(shards, root)
    groups, unused = group_by_split(names)
    layout, folder_of = _read_folders(source, index, groups, unused)
    parts = parts_of(layout, store, folder_of)
    labelled = index.column("label").null_count < len(index)
    if labelled or not any(layout.class_of):
        numbers, texts = distinct_values(index.column("label"))
        for split, part in parts.items():
            labels, unlabelled = _labels(source, numbers[part.rows], texts, store, part.rows)
            parts[split] = Part(store, part.rows, labels, unlabelled)
    else:
        notes.append("No .cls or .json member holds a label: the folders inside the shards are taken for classes.")
    notes += [*layout.notes, *note_ignored_splits(names, parts)]
    return Contents(parts, dict(Counter(left_out) + count_unused(layout, folder_of)), tuple(notes))


def _read_folders(source: str, index: Any, groups: dict[str, list[int]], unused: list[int]) -> tuple[Layout, Integers]:
    """Read the splits and the classes from the folders inside the shards, below the splits that shards declare.

    Returns:
        what the folders mean, and the number of the folder of each image.
    """
    split_of: dict[int, str | None] = dict.fromkeys(unused)
    split_of |= {shard: split if len(groups) > 1 else "" for split, shards in groups.items() for shard in shards}
    import pyarrow.compute as pc

    before_last_slash = {"pattern": "(?s)^(?:(.*)/)?[^/]*$", "replacement": r"\1"}
    codes, folders = distinct_values(pc.replace_substring_regex(index.column("member"), **before_last_slash))
    splits = list(dict.fromkeys(split_of.values()))
    split_number = np.array([splits.index(split_of[shard]) for shard in range(len(split_of))], dtype=np.int64)
    keys, first, key_of = np.unique(
        split_number[index.column("shard").to_numpy()] * len(folders) + codes, return_index=True, return_inverse=True
    )
    in_order = [divmod(int(key), len(folders)) for key in keys[np.argsort(first)]]
    used = [(splits[split], folders[folder]) for split, folder in in_order if splits[split] is not None]
    number_of = {key: number for number, key in enumerate(used)}
    of_keys = [(splits[int(key) // len(folders)], folders[int(key) % len(folders)]) for key in keys]
    folder_of = np.array([number_of.get(key, len(used)) for key in of_keys], dtype=np.int64)[key_of]
    paths = (f"{split}/{folder}".split("/") for split, folder in used)
    layout = read_layout(source, [tuple(part for part in path if part not in ("", ".")) for path in paths])
    if len(used) in folder_of:
        layout.split_of.append("")
        layout.class_of.append(None)
        layout.reason_of[len(used)] = "in files that name no split, beside files that do"
    return layout, folder_of


def _labels(
    source: str, numbers: Integers, texts: list[str], store: ShardStore, rows: Integers
) -> tuple[Labels | None, str]:
    """Return labels as codes; or None, and why, if they cannot be classes.

    Labels are numbers if all of them are, so that "10" is sorted after "9".
    """

    def number(text: str) -> float:
        if "_" in text:  # which Python accepts between digits
            raise ValueError
        return int(text) if text.lstrip("+-").isdecimal() else float(text)  # floats would merge large numbers

    used = np.unique(numbers[numbers >= 0])
    if not len(used):
        return None, "no .cls or .json member holds a label"
    try:
        values = {int(place): number(texts[place]) for place in used}
    except ValueError:
        return encode_labels(source, numbers, texts), ""
    wrong = first_and_count(numbers, [values.get(place, 0.0) % 1 != 0 for place in range(len(texts))])
    if wrong is not None:
        reason = f"{store.identify(int(rows[wrong[0]]))} has the label {texts[numbers[wrong[0]]]}, which is no class"
        return None, Note(reason, "lost labels")
    whole = [int(values[place]) if place in values else None for place in range(len(texts))]
    return encode_labels(source, numbers, whole), ""


def _load_index(source: str, shards: list[Path]) -> Any:
    """Load the index of the shards from the cache, or make it if the shards have changed or were never indexed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    key = hashlib.sha256(str(_INDEX_VERSION).encode())
    for shard in shards:
        try:
            key.update(f"{file_version(shard)}\n".encode())
        except OSError as error:
            raise DataError(f"--data '{source}': '{shard}' cannot be opened: {error.strerror}.") from error
    path = cache_folder(f"shards-{key.hexdigest()[:32]}.parquet")
    with contextlib.suppress(Exception):  # an index that is absent or damaged is rebuilt below
        return pq.read_table(path)
    index = make_index(source, shards)
    with contextlib.suppress(OSError):  # without a writable cache, only the next start takes longer
        path.parent.mkdir(parents=True, exist_ok=True)
        sink = pa.BufferOutputStream()
        pq.write_table(index, sink)
        own = path.with_name(f"{path.stem}-{socket.gethostname()}-{os.getpid()}.parquet")
        write_atomically(own, sink.getvalue().to_pybytes())  # all ranks may index the same shards at the same time
        own.replace(path)
    return index


def make_index(source: str, shards: list[Path]) -> Any:
    """Read the headers of all members of all shards.

    Returns:
        Arrow table with the columns shard, member, offset, size and label (text or null); its metadata holds what is
        left out and notes for the user, as JSON.

    Raises:
        DataError: a shard is not an uncompressed tar file.
    """
    import pyarrow as pa

    types = {"shard": pa.int32(), "member": pa.large_string(), "offset": pa.int64(), "size": pa.int64()}
    schema, batches = pa.schema(types | {"label": pa.string()}), []
    left_out: Counter[str] = Counter()
    notes: list[str] = []
    is_remote = any(isinstance(shard, RemotePath) for shard in shards)
    with ThreadPoolExecutor(_THREADS if is_remote else 1) as threads:
        indices = threads.map(index_shard, shards)  # each is freed once it is in the table
        for number, shard in enumerate(shards):
            try:
                found = next(indices)
            except (tarfile.TarError, OSError) as error:
                threads.shutdown(wait=False, cancel_futures=True)
                reason = error.strerror if isinstance(error, OSError) and error.strerror else None
                remedy = "" if reason else "\nShards must be uncompressed .tar files."
                raise DataError(
                    f"--data '{source}': '{shard}' cannot be read as a tar file: {reason or first_line(error)}.{remedy}"
                ) from error
            left_out += found.left_out
            notes += found.notes
            columns = zip(*((number, *image) for image in found.images), strict=True)
            if found.images:
                arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
                batches.append(pa.record_batch(arrays, schema=schema))
    table = pa.Table.from_batches(batches, schema)
    if len(notes) > _MAX_NOTES:
        notes[_MAX_NOTES:] = [f"There is more damage in the shards: {len(notes) - _MAX_NOTES:,} further places."]
    return table.replace_schema_metadata({"left_out": json.dumps(left_out), "notes": json.dumps(notes)})
