"""Tar shards (WebDataset), read at random.

The headers of all members are read once; the index (which bytes of which shard are an image) is kept as a
parquet file in the cache folder. An image is then one `os.pread`, so shards need neither unpacking nor a
shuffle buffer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from pecobook.data.decode import BadImage, decode
from pecobook.data.source import IMAGE_EXTENSIONS, Integers, Part, group_by_split, names_under
from pecobook.errors import DataError

_FORMAT = 1  # of the index; a new number makes old indices unused
_MAX_OPEN = 256  # shards kept open per process; those beyond are opened for each image


class ShardStore:
    """Images inside tar files.

    Args:
        shards: the tar files.
        index: Arrow table with the columns shard (number), member (name), offset, size (bytes).
    """

    def __init__(self, shards: list[Path], index: Any) -> None:
        self._shards = shards
        self._members = index.column("member").combine_chunks()
        self._shard = index.column("shard").to_numpy()
        self._offset = index.column("offset").to_numpy()
        self._size = index.column("size").to_numpy()
        # shard -> file descriptor; pread has no position, so forks may share it
        self._open: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)

    def __len__(self) -> int:
        return len(self._shard)

    def identify(self, row: int) -> str:
        """The shard's path, a slash, the member's name."""
        return f"{self._shards[self._shard[row]]}/{self._members[row].as_py()}"

    def read(self, row: int) -> Tensor:
        """The image, uint8 (3, H, W)."""
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
        """A hash of the shards' file names and of the members' names, places and sizes."""
        digest = hashlib.sha256(repr([shard.name for shard in self._shards]).encode())
        for column in (self._shard, self._offset, self._size):
            digest.update(column[rows].astype("<i8").tobytes())
        digest.update("\0".join(self._members.take(rows).to_pylist()).encode())
        return digest.hexdigest()


def shard_parts(source: str, shards: list[Path], *, root: Path | None = None) -> dict[str, Part]:
    """The splits of tar files; each image member is an image, labelled by a `.cls` or a `.json` {"label"} of the same
    name.

    The names of the shards, and of their folders under `root`, declare splits as those of parquet files do.

    Raises:
        DataError: a shard is no plain tar file, or there is no image in any.
    """
    from pecobook.data.tables import number_labels

    index = _load_index(source, shards)
    if len(index) == 0:
        raise DataError(
            f"--data '{source}': no images in {len(shards)} tar files. "
            f"Extensions that are read: {', '.join(IMAGE_EXTENSIONS)}."
        )
    values = _numbers_if_all(index.column("label").to_pylist())
    store = ShardStore(shards, index)
    shard_of = index.column("shard").to_numpy()
    parts = {}
    for split, numbers in group_by_split(names_under(shards, root)).items():
        rows = np.flatnonzero(np.isin(shard_of, numbers))
        mine = [values[row] for row in rows]
        labels = None if all(value is None for value in mine) else number_labels(source, mine)
        parts[split] = Part(store, rows, labels)
    return parts


def _numbers_if_all(labels: list[str | None]) -> list[Any]:
    """Labels as integers when all of them are, so that "10" comes after "9"."""
    try:
        return [None if label is None else int(label) for label in labels]
    except ValueError:
        return labels


def _load_index(source: str, shards: list[Path]) -> Any:
    """The index of these shards, from the cache when none of them has changed since."""
    import pyarrow.parquet as pq

    key = hashlib.sha256(str(_FORMAT).encode())
    for shard in shards:
        try:
            status = shard.stat()
        except OSError as error:
            raise DataError(f"--data '{source}': '{shard}' cannot be opened: {error.strerror}.") from error
        key.update(f"{shard.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    folder = Path(os.environ.get("PECOBOOK_CACHE") or Path.home() / ".cache" / "pecobook").expanduser()
    path = folder / f"shards-{key.hexdigest()[:32]}.parquet"
    with contextlib.suppress(Exception):  # absent, or damaged: then it is made again
        return pq.read_table(path)
    index = _make_index(source, shards)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the run
        _write_atomically(index, path)
    return index


def _write_atomically(index: Any, path: Path) -> None:
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        try:
            pq.write_table(index, file)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _make_index(source: str, shards: list[Path]) -> Any:
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
                "Shards must be plain .tar files, not compressed ones."
            ) from error
    kinds = {"shard": pa.int32(), "member": pa.large_string(), "offset": pa.int64(), "size": pa.int64()}
    return pa.table({name: pa.array(columns[name], kind) for name, kind in (kinds | {"label": pa.string()}).items()})


def _index_shard(shard: Path) -> Iterator[tuple[str, int, int, str | None]]:
    """(member, offset, size, label) of the images of one shard, in its order.

    A sample is all members with the same name up to the first dot of the file name, so "a.seg.png" is an
    annotation of "a" and no image. In shards with no image named so, the name ends at the last dot.
    """
    strict: list[tuple[str, int, int]] = []
    loose: list[tuple[str, int, int]] = []
    labels: dict[str, str] = {}
    with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
        for name, offset, size in _members(tar):
            key, extension = _split_name(name)
            if extension in IMAGE_EXTENSIONS:
                strict.append((name, offset, size))
            elif name.lower().endswith(tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)):
                loose.append((name, offset, size))
            elif extension in ("cls", "json") or name.endswith((".cls", ".json")):
                label = _read_label(file, offset, size, is_json=name.endswith("json"))
                if label is not None:
                    labels[key] = labels[name.rpartition(".")[0]] = label
    if strict:
        yield from ((name, offset, size, labels.get(_split_name(name)[0])) for name, offset, size in strict)
    else:
        yield from ((name, offset, size, labels.get(name.rpartition(".")[0])) for name, offset, size in loose)


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, int, int]]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # else it keeps a kilobyte for each member
        hidden = member.name.rpartition("/")[2].startswith(".")
        if member.isreg() and not hidden:
            name = member.name.encode(errors="surrogateescape").decode(errors="replace")
            yield name, member.offset_data, member.size


def _split_name(name: str) -> tuple[str, str]:
    """("folder/key", "jpg") of "folder/key.jpg"; the extension begins at the first dot of the file name."""
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
