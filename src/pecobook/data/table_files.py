"""Parquet files: what tells one from another, the files that a column of images names, and the bytes that it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pecobook.data.source import Integers


def _field(column: Any, name: str) -> Any:
    """Return a field of a column of {bytes, path}, or None where there is none."""
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
    """Return the file of a path in a table that lies in `folder`."""
    file = folder / path
    if "\\" in path and not file.is_file():  # written on Windows
        file = folder / path.replace("\\", "/")
    return file


def differences(files: list[Path], schemas: list[Any], columns: list[str]) -> str:
    """Return a sentence on a column that does not have the same type in all files; an empty text if there is none."""
    for name in columns:
        for file, schema in zip(files, schemas, strict=True):
            first, kind = schemas[0].field(name).type, schema.field(name).type
            if first != kind:
                return f"\nThe column '{name}' holds {first} in '{files[0]}', but {kind} in '{file}': use one type."
    return ""


def damage(files: list[Path], columns: list[str]) -> str:
    """Return a sentence that names the first file that cannot be read to its end; an empty text if there is none."""
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
