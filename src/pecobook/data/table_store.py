"""Reads images from a column of a table: encoded bytes, or the paths of image files, and what identifies a table."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from pecobook.data.decode import BadImage, read_file
from pecobook.data.remote import is_remote
from pecobook.data.source import Integers, Store, hash_some


class TableStore(Store):
    """One column of encoded images.

    Args:
        images: a `datasets.Dataset` with a single column: binary, {bytes, path}, or paths as text. A relative path is
            looked up next to the file that contains the row.
        column: the name of the column.
        files: (name, number of rows) of the files that hold the rows, in order.
        identity: text that identifies the table; it is part of the fingerprint.
    """

    def __init__(self, images: Any, column: str, files: Sequence[tuple[str, int]], identity: str) -> None:
        self._images, self._column, self._identity = images, column, identity
        self._names = [name for name, _ in files]
        self._starts = np.cumsum([0, *(rows for _, rows in files)])

    def __len__(self) -> int:
        return len(self._images)

    def identify(self, row: int) -> str:
        """Return the name of the file and the number of the row in the file."""
        file = self._file_of(row)
        return f"{self._names[file]} row {row - self._starts[file]}"

    def _file_of(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def file(self, row: int) -> bytes:
        """Return the encoded bytes of the image of a row. Raises BadImage."""
        value = self._images[row][self._column]
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if isinstance(data, str):
            data, path = None, data
        if data is None and path:
            data = self._read_file(row, path)
        if data is None:
            raise BadImage(self.identify(row), "no image in this row")
        return cast("bytes", data)

    def _read_file(self, row: int, path: str) -> bytes:
        path = path.removeprefix("file://")
        shown = path if len(path) <= 200 else f"{path[:40]}... ({len(path):,} characters)"
        if "://" in path or is_remote(self._names[self._file_of(row)]):
            raise BadImage(self.identify(row), f"{shown} is an address, not a file; download the images first")
        folder = self._folder_of(row)
        try:
            return read_file(file_of_path(folder, path), name=f"{self.identify(row)}: {folder / shown}")
        except (OSError, ValueError):  # such as a text with a zero byte
            raise BadImage(self.identify(row), f"'{shown}' is no path of an image") from None

    def _folder_of(self, row: int) -> Path:
        return Path(self._names[self._file_of(row)]).parent

    def files(self, rows: Integers) -> Iterator[bytes]:
        """Yield the paths of the tables, and of the image files if the tables hold paths."""
        numbers = np.unique(np.searchsorted(self._starts, rows, side="right") - 1)
        yield from (os.fsencode(self._names[number]) for number in numbers)
        for row, path in paths_in_rows(self._images.data.column(self._column), rows):
            with contextlib.suppress(ValueError):  # a text that is not a path
                yield os.fsencode(file_of_path(self._folder_of(row), path))

    def num_bytes(self) -> int:
        """Return the bytes of all encoded images."""
        return num_bytes(self._images.data.column(self._column))

    def digest(self, rows: Integers) -> str:
        """Return a hash of the files' names, sizes and footers, of the row numbers, and of the bytes of some images."""
        digest = hash_some(self.encoded, rows)
        digest.update(self._identity.encode() + rows.astype("<i8").tobytes())
        return digest.hexdigest()


def store_of_column(table: Any, column: str, files: Sequence[tuple[str, int]], identity: str) -> TableStore:
    """Return the images of a column; the encoded bytes are left as they are."""
    from datasets import Image

    images = table.select_columns([column])
    if isinstance(table.features[column], Image):
        images = images.cast_column(column, Image(decode=False))
    return TableStore(images, column, files, identity)


def _field(column: Any, name: str) -> Any:
    """Return a field of a column of {bytes, path}, or None if there is none."""
    import pyarrow.compute as pc

    return pc.struct_field(column, name) if column.type.get_field_index(name) >= 0 else None


def num_bytes(column: Any) -> int:
    """Return the bytes of all encoded images, or of all paths, in an Arrow column."""
    import pyarrow.compute as pc

    values = _field(column, "bytes") if column.type.num_fields else column
    return 0 if values is None else int(pc.sum(pc.binary_length(values)).as_py() or 0)


def paths_in_rows(column: Any, rows: Integers) -> Iterator[tuple[int, str]]:
    """Yield (row, path) of the rows that hold the path of a file instead of bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if column.type.num_fields:
        paths, held = _field(column, "path"), _field(column, "bytes")
        if paths is None or (held is not None and held.null_count == 0):
            return
        column = paths if held is None else pc.if_else(pc.is_null(held), paths, None)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or "view" in str(column.type)):
        return
    for row, path in zip(rows.tolist(), column.take(rows).to_pylist(), strict=True):
        if isinstance(path, str) and path and "://" not in (path := path.removeprefix("file://")):
            yield row, path


def file_of_path(folder: Path, path: str) -> Path:
    """Return the file of a path in a table in `folder`; the path may come from another machine, or from Windows."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")][-20:]
    candidates = (folder / path, *(folder.joinpath(*parts[start:]) for start in range(len(parts))))
    with contextlib.suppress(OSError):  # a name that is too long
        return next((file for file in candidates if file.is_file()), candidates[0])
    return candidates[0]


def differences(files: list[Path], schemas: list[Any], columns: list[str]) -> str:
    """Return a sentence on a column whose type differs between files; an empty string if there is none."""
    for name in columns:
        for file, schema in zip(files, schemas, strict=True):
            first, kind = schemas[0].field(name).type, schema.field(name).type
            if first != kind:
                return f"\nThe column '{name}' holds {first} in '{files[0]}', but {kind} in '{file}': use one type."
    return ""


def damage(files: list[Path], columns: list[str]) -> str:
    """Return a sentence that names the first file that cannot be read to its end; an empty string if there is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        try:
            for _ in pq.ParquetFile(file).iter_batches(columns=columns):
                pass
        except (OSError, pa.ArrowException):
            return f"\nThe file '{file}' is damaged."
    return ""


def content_key(file: Path) -> tuple[int, str]:
    """Return the size of a parquet file and a hash of its footer, which holds the sizes and extremes of its columns."""
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(-8, 2)
        length = min(int.from_bytes(opened.read(4), "little") + 8, size)
        opened.seek(-length, 2)
        return size, hashlib.sha256(opened.read()).hexdigest()
