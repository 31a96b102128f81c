"""The files of `pecobook embed`: parts while it runs, joined into one file at the end.

A part contains the images of one range of one split: `part-00000.parquet` with the columns image, split, label (text,
or null without a label), embedding (float32, P x C numbers for patch vectors), and with --codes codes and histogram. A
part that exists is complete, so a killed command continues where it stopped.
"""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pecobook.errors import DataError, first_line
from pecobook.utils.files import sync_folder, write_atomically

_OF_IMAGES = ("image", "split", "label")


def part_file(folder: Path, number: int) -> Path:
    """Return the path of part `number`."""
    return folder / f"part-{number:05d}.parquet"


def write_part(file: Path, names: list[str], split: str, labels: list[str | None], arrays: dict[str, Any]) -> None:
    """Write a part; the arrays are (N, ...) by column name, and their shapes are stored with them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "image": pa.array(names, pa.string()),
        "split": pa.array([split] * len(names), pa.string()),
        "label": pa.array(labels, pa.string()),
    }
    for name, array in arrays.items():
        flat = np.ascontiguousarray(array).reshape(len(names), -1)
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
    shapes = {f"shape of {name}": " ".join(map(str, array.shape[1:])) for name, array in arrays.items()}
    table = pa.table(columns).replace_schema_metadata(shapes)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, write_page_checksum=True)
    write_atomically(file, buffer.getvalue())


def join_parts(parts: list[Path], out: Path, about: dict[str, Any]) -> int:
    """Join the parts into `out`, with one part in memory at a time; return the number of images.

    Raises:
        DataError: no image could be read, or a part is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = out.with_name(f".{out.name}.tmp")
    try:
        counts = [pq.read_metadata(part).num_rows for part in parts]
        filled = [part for part, count in zip(parts, counts, strict=True) if count]
        if not filled:
            raise DataError("None of the images can be read.")
        if out.suffix.lower() == ".parquet":
            _join_parquet(filled, temporary, about)
        else:
            _join_arrays(filled, sum(counts), temporary, out, about)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # the parts are removed next
        temporary.replace(out)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # from the file system
            raise
        text = f"A file in '{parts[0].parent}' is damaged ({first_line(error).rstrip('.')})."
        raise DataError(f"{text} Delete that folder, and start the command again.") from None
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(out.parent)
    return sum(counts)


def _join_parquet(parts: list[Path], temporary: Path, about: dict[str, Any]) -> None:
    import pyarrow.parquet as pq

    first = pq.read_schema(parts[0])
    metadata = {**(first.metadata or {}), b"pecobook": json.dumps(about).encode()}
    with pq.ParquetWriter(temporary, first.with_metadata(metadata)) as writer:
        for part in parts:
            table = pq.read_table(part, page_checksum_verification=True)
            writer.write_table(table.replace_schema_metadata(metadata))


def _join_arrays(parts: list[Path], count: int, temporary: Path, out: Path, about: dict[str, Any]) -> None:
    """Write .npy with a .csv of the rows, or .npz; arrays pass through files, since they may not fit into memory."""
    import pyarrow.parquet as pq

    schema = pq.read_schema(parts[0])
    files = {name: out.with_name(f".{out.name}.{name}.npy.tmp") for name in schema.names[len(_OF_IMAGES) :]}
    try:
        for name, file in files.items():
            shape = tuple(map(int, schema.metadata[f"shape of {name}".encode()].split()))
            _fill(file, (count, *shape), (_column(part, name) for part in parts))
        rows = [row for part in parts for row in pq.read_table(part, columns=list(_OF_IMAGES)).to_pylist()]
        if out.suffix.lower() == ".npy":
            text = io.StringIO()
            writer = csv.DictWriter(text, _OF_IMAGES)
            writer.writeheader()
            writer.writerows(rows)
            write_atomically(out.with_suffix(".csv"), text.getvalue().encode(errors="surrogateescape"))
            files["embedding"].replace(temporary)
        else:
            with zipfile.ZipFile(temporary, "w") as archive:
                for name, file in files.items():
                    archive.write(file, f"{name}.npy")
                texts = {name: np.array([row[name] or "" for row in rows]) for name in _OF_IMAGES}
                for name, array in {**texts, "about": np.array(json.dumps(about))}.items():
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array, allow_pickle=False)
    finally:
        for file in files.values():
            file.unlink(missing_ok=True)


def _column(part: Path, name: str) -> np.ndarray[Any, Any]:
    import pyarrow.parquet as pq

    table = pq.read_table(part, columns=[name], page_checksum_verification=True)
    column = table.column(name).combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)  # type: ignore[no-any-return]


def _fill(file: Path, shape: tuple[int, ...], blocks: Iterator[np.ndarray[Any, Any]]) -> None:
    target, start = None, 0
    for block in blocks:
        if target is None:
            target = np.lib.format.open_memmap(file, mode="w+", dtype=block.dtype, shape=shape)
        target[start : start + len(block)] = block.reshape(len(block), *shape[1:])
        start += len(block)
    assert target is not None
    target.flush()
