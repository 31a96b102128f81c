"""Reads images from tar shards (WebDataset) in any order.

The headers of all members are read once. The resulting index, which lists the shard, the offset and the size of each
image, is stored as a parquet file in the cache folder. One `os.pread` then reads an image, so shards need neither
unpacking nor a shuffle buffer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from pecobook.data.decode import BadImage, decode
from pecobook.data.source import IMAGE_EXTENSIONS, Integers, Part, relative_names
from pecobook.data.split_names import group_by_split
from pecobook.errors import DataError
from pecobook.utils.files import write_atomically

_INDEX_VERSION = 1  # a new number invalidates the cached indices
_MAX_OPEN = 256  # shards that each process keeps open; further shards are opened anew for each image


class ShardStore:
    """Images inside tar files.

    Args:
        shards: the tar files.
        index: Arrow table with the columns shard (number), member (name), offset and size (both in bytes).
    """

    def __init__(self, shards: list[Path], index: Any) -> None:
        self._shards = shards
        self._members = index.column("member").combine_chunks()
        self._shard = index.column("shard").to_numpy()
        self._offset = index.column("offset").to_numpy()
        self._size = index.column("size").to_numpy()
        # shard -> file descriptor; pread uses no file position, so forked processes may share the descriptor
        self._open: dict[int, int] = {}

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

    def read(self, row: int) -> Tensor:
        """Read and decode the image of a row: uint8 (3, H, W)."""
        name, size = self.identify(row), int(self._size[row])
        try:
            data = self._pread(int(self._shard[row]), size, int(self._offset[row]))
        except OSError as error:
            raise BadImage(name, error.strerror or str(error)) from error
        if len(data) < size:
            raise BadImage(name, f"the shard ends {size - len(data)} bytes too early")
        return decode(data, name=name)

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        descriptor = self._open.get(shard)
        if descriptor is not None:
            return os.pread(descriptor, size, offset)
        descriptor = os.open(self._shards[shard], os.O_RDONLY)
        if len(self._open) < _MAX_OPEN and self._open.setdefault(shard, descriptor) == descriptor:
            return os.pread(descriptor, size, offset)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def digest(self, rows: Integers) -> str:
        """Return a hash of the shards' file names and of the members' names, shards, offsets and sizes."""
        digest = hashlib.sha256(repr([shard.name for shard in self._shards]).encode())
        for column in (self._shard, self._offset, self._size):
            digest.update(column[rows].astype("<i8").tobytes())
        digest.update("\0".join(self._members.take(rows).to_pylist()).encode())
        return digest.hexdigest()


def shard_parts(source: str, shards: list[Path], *, root: Path | None = None) -> dict[str, Part]:
    """Return the splits of tar files.

    Each image member is an image. Its label is the content of the `.cls` member of the same name, or the value of
    "label" in the `.json` member of that name. The names of the shards, and of their folders under `root`, declare
    splits, as for parquet files.

    Raises:
        DataError: a shard is not an uncompressed tar file, or no shard holds an image.
    """
    from pecobook.data.tables import encode_labels

    index = _load_index(source, shards)
    if len(index) == 0:
        raise DataError(
            f"--data '{source}': no images in {len(shards)} tar files. "
            f"Supported extensions: {', '.join(IMAGE_EXTENSIONS)}."
        )
    label_values = _to_integers(index.column("label").to_pylist())
    store = ShardStore(shards, index)
    shard_of = index.column("shard").to_numpy()
    parts = {}
    for split, numbers in group_by_split(relative_names(shards, root))[0].items():
        rows = np.flatnonzero(np.isin(shard_of, numbers))
        split_values = [label_values[row] for row in rows]
        labels = None if all(value is None for value in split_values) else encode_labels(source, split_values)
        parts[split] = Part(store, rows, labels)
    return parts


def _to_integers(labels: list[str | None]) -> list[Any]:
    """Convert labels to integers if all of them are integers, so that "10" is sorted after "9"."""
    try:
        return [None if label is None else int(label) for label in labels]
    except ValueError:
        return labels


def _load_index(source: str, shards: list[Path]) -> Any:
    """Load the index of the shards from the cache, or make it if the shards have changed or were never indexed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    key = hashlib.sha256(str(_INDEX_VERSION).encode())
    for shard in shards:
        try:
            status = shard.stat()
        except OSError as error:
            raise DataError(f"--data '{source}': '{shard}' cannot be opened: {error.strerror}.") from error
        key.update(f"{shard.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    folder = Path(os.environ.get("PECOBOOK_CACHE") or Path.home() / ".cache" / "pecobook").expanduser()
    path = folder / f"shards-{key.hexdigest()[:32]}.parquet"
    with contextlib.suppress(Exception):  # an index that is absent or damaged is made anew below
        return pq.read_table(path)
    index = make_index(source, shards)
    with contextlib.suppress(OSError):  # without a writable cache, only the next start takes longer
        folder.mkdir(parents=True, exist_ok=True)
        sink = pa.BufferOutputStream()
        pq.write_table(index, sink)
        own = path.with_name(f"{path.stem}-{socket.gethostname()}-{os.getpid()}.parquet")
        write_atomically(own, sink.getvalue().to_pybytes())  # all ranks may index the same shards at the same time
        own.replace(path)
    return index


def make_index(source: str, shards: list[Path]) -> Any:
    """Read the headers of all shards and return the index, an Arrow table. Raises DataError."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {"shard": [], "member": [], "offset": [], "size": [], "label": []}
    for number, shard in enumerate(shards):
        try:
            for member, offset, size, label in _index_shard(shard):
                for column, value in zip(columns, (number, member, offset, size, label), strict=True):
                    columns[column].append(value)
        except (tarfile.TarError, OSError) as error:
            raise DataError(
                f"--data '{source}': '{shard}' cannot be read as a tar file: {error}.\n"
                "Shards must be uncompressed .tar files."
            ) from error
    types = {"shard": pa.int32(), "member": pa.large_string(), "offset": pa.int64(), "size": pa.int64()}
    return pa.table({name: pa.array(columns[name], kind) for name, kind in (types | {"label": pa.string()}).items()})


def _index_shard(shard: Path) -> Iterator[tuple[str, int, int, str | None]]:
    """Yield (member, offset, size, label) of each image of a shard, in the order of the members.

    A sample consists of all members with the same name up to the first dot of the file name, so "a.seg.png" is an
    annotation of the image "a" and not an image. If a shard holds no image by this rule, names end at the last dot.
    """
    first_dot: list[tuple[str, int, int]] = []
    last_dot: list[tuple[str, int, int]] = []
    labels: dict[str, str] = {}
    with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
        for name, offset, size in _members(tar):
            key, extension = _split_name(name)
            if extension in IMAGE_EXTENSIONS:
                first_dot.append((name, offset, size))
            elif name.lower().endswith(tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)):
                last_dot.append((name, offset, size))
            elif extension in ("cls", "json") or name.endswith((".cls", ".json")):
                label = _read_label(file, offset, size, is_json=name.endswith("json"))
                if label is not None:
                    labels[key] = labels[name.rpartition(".")[0]] = label
    if first_dot:
        yield from ((name, offset, size, labels.get(_split_name(name)[0])) for name, offset, size in first_dot)
    else:
        yield from ((name, offset, size, labels.get(name.rpartition(".")[0])) for name, offset, size in last_dot)


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, int, int]]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # otherwise a kilobyte stays in memory for each member
        hidden = member.name.rpartition("/")[2].startswith(".")
        if member.isreg() and not hidden:
            name = member.name.encode(errors="surrogateescape").decode(errors="replace")
            yield name, member.offset_data, member.size


def _split_name(name: str) -> tuple[str, str]:
    """Split "folder/key.jpg" into ("folder/key", "jpg"); the extension begins at the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    key, _, extension = file.partition(".")
    return folder + slash + key, extension.lower()


def _read_label(file: IO[bytes], offset: int, size: int, *, is_json: bool) -> str | None:
    text = os.pread(file.fileno(), size, offset).decode(errors="replace").strip()
    if not is_json:
        return text or None
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    label = value.get("label") if isinstance(value, dict) else None
    return str(label) if isinstance(label, (int, str)) else None
