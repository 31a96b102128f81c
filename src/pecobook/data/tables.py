"""Reads images from parquet files and from data sets of the Hugging Face hub, both with the library `datasets`.

`datasets` writes an Arrow copy to its cache once and maps this copy into memory. Rows can then be read in any order,
and all processes share the memory pages. The images in the copy stay encoded (`decode=False`); `pecobook.data.decode`
decodes them.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from pecobook.data.decode import BadImage, decode
from pecobook.data.source import Integers, Labels, Part, relative_names
from pecobook.data.split_names import group_by_split
from pecobook.errors import DataError, did_you_mean, first_line


class TableStore:
    """One column of encoded images.

    Args:
        images: a `datasets.Dataset` with a single column of {bytes, path} or binary values.
        column: the name of the column.
        files: (name, number of rows) of the files that hold the rows, in order.
        identity: text that identifies the table; it goes into the fingerprint.
    """

    def __init__(self, images: Any, column: str, files: Sequence[tuple[str, int]], identity: str) -> None:
        self._images, self._column, self._identity = images, column, identity
        self._names = [name for name, _ in files]
        self._starts = np.cumsum([0, *(rows for _, rows in files)])

    def __len__(self) -> int:
        return len(self._images)

    def identify(self, row: int) -> str:
        """Return the name of the file and the number of the row in the file."""
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self._names[file]} row {row - self._starts[file]}"

    def read(self, row: int) -> Tensor:
        """Read and decode the image of a row: uint8 (3, H, W)."""
        return decode(self.encoded(row), name=self.identify(row))

    def encoded(self, row: int) -> bytes:
        """Return the encoded bytes of the image of a row. Raises BadImage."""
        value = self._images[row][self._column]
        if isinstance(value, dict):
            data = value.get("bytes")
            if data is None and value.get("path"):
                data = self._read_file(row, value["path"])
        else:
            data = value
        if data is None:
            raise BadImage(self.identify(row), "no image in this row")
        return cast("bytes", data)

    def _read_file(self, row: int, path: str) -> bytes:
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise BadImage(self.identify(row), f"{path}: {error.strerror}") from error

    def digest(self, rows: Integers) -> str:
        """Return a hash of the files' names and sizes and of the row numbers."""
        return hashlib.sha256(self._identity.encode() + rows.astype("<i8").tobytes()).hexdigest()


def parquet_parts(source: str, files: list[Path], *, root: Path | None = None) -> dict[str, Part]:
    """Return the splits of parquet files with a column `image` ({bytes, path} or binary) and optionally `label`.

    The class names come from the Hugging Face metadata of the schema, else from the lines of a `classes.txt` next to
    the first file; otherwise the sorted label values are the names. The names of the files and of their folders declare
    splits. A single file is the training set whatever its name is, and 10% of its images are held out.

    Raises:
        DataError: a file cannot be read or has no image column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import load_dataset

    parts: dict[str, Part] = {}
    for split, numbers in group_by_split(relative_names(files, root))[0].items():
        split_files = [files[number] for number in numbers]
        try:
            counts = [pq.read_metadata(file).num_rows for file in split_files]
            schema = pq.read_schema(split_files[0])
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"--data '{source}': a parquet file cannot be read: {_first_line(error)}.") from error
        if "image" not in schema.names:
            raise DataError(_no_image_column(f"{source}' ('{split_files[0].name}')", schema.names))
        try:
            paths = [glob.escape(str(file)) for file in split_files]  # datasets treats paths as patterns
            table = load_dataset("parquet", data_files={split: paths}, split=split)
        except Exception as error:  # datasets wraps all errors of Arrow in exceptions of its own
            raise DataError(
                f"--data '{source}': the parquet files of {split} cannot be loaded: {_first_line(error)}."
            ) from error
        identity = repr([(file.name, file.stat().st_size) for file in split_files])
        rows = [(str(file), count) for file, count in zip(split_files, counts, strict=True)]
        names = _class_names(split_files[0].with_name("classes.txt"))
        parts[split] = _part(source, table, "image", rows, identity, names)
    return parts


def hub_parts(source: str) -> dict[str, Part]:
    """Return the splits of a data set of the hub, `hf:owner/name[:config]`.

    The images are the column `image`, or else the first image column; the labels are the column `label`, or else the
    first ClassLabel column.

    Raises:
        DataError: the data set cannot be loaded for any reason, or has no image column.
    """
    parts: dict[str, Part] = {}
    for split, (name, config, declared, table) in hub_tables(source).items():
        column = _image_column(source, table.features)
        identity = repr((name, config, declared, len(table), sorted(table.features)))
        parts[split] = _part(source, table, column, [(f"{name} {declared}", len(table))], identity, None)
    return parts


def hub_tables(source: str) -> dict[str, tuple[str, str, str, Any]]:
    """Load a data set of the hub, `hf:owner/name[:config]`.

    Returns:
        (owner/name, config, the hub's name of the split, the table of the split) for each split.

    Raises:
        DataError: the data set cannot be loaded for any reason.
    """
    from datasets import load_dataset

    name, _, config = source.removeprefix("hf:").partition(":")
    try:
        loaded = load_dataset(name, config or None)
    except Exception as error:  # network, hub, gated, unknown name, builder: each library raises exceptions of its own
        raise DataError(
            f"--data '{source}' cannot be loaded from the Hugging Face hub: {_first_line(error)}\n"
            "Check the name (hf:owner/name or hf:owner/name:config), the network, and your access to a gated data set."
        ) from error
    names = list(loaded)
    tables = {}
    for split, numbers in group_by_split(names)[0].items():
        # "train" without "train_extra", because splits that may overlap must not be joined.
        declared = min((names[number] for number in numbers), key=len)
        tables[split] = (name, config, declared, loaded[declared])
    return tables


def _part(
    source: str,
    table: Any,
    column: str,
    files: Sequence[tuple[str, int]],
    identity: str,
    names: tuple[str, ...] | None,
) -> Part:
    from datasets import Image

    images = table.select_columns([column])
    if isinstance(table.features[column], Image):
        images = images.cast_column(column, Image(decode=False))
    elif not _holds_bytes(table.features[column]):
        raise DataError(
            f"--data '{source}': the column '{column}' holds {table.features[column]}; "
            "it must hold encoded images, as binary or as {bytes, path}."
        )
    store = TableStore(images, column, files, identity)
    return Part(store, np.arange(len(images), dtype=np.int64), _labels(source, table, names))


def _holds_bytes(feature: Any) -> bool:
    inner = feature.get("bytes") if isinstance(feature, dict) else feature
    return getattr(inner, "dtype", None) in ("binary", "large_binary")


def _image_column(source: str, features: Any) -> str:
    from datasets import Image

    if "image" in features:
        return "image"
    for column, feature in features.items():
        if isinstance(feature, Image):
            return str(column)
    raise DataError(_no_image_column(f"{source}'", features))


def _no_image_column(where: str, columns: Sequence[str]) -> str:
    suggestion = did_you_mean("image", columns)
    return (
        f"--data '{where} has no column 'image'; it has {', '.join(columns)}.{suggestion}\n"
        "Rename the column that holds the encoded images to 'image'."
    )


def _labels(source: str, table: Any, names: tuple[str, ...] | None) -> Labels | None:
    """Return the label column as codes, or None if there is no label column or its type cannot be a class."""
    from datasets import ClassLabel

    column = "label" if "label" in table.features else None
    if column is None:
        column = next((name for name, kind in table.features.items() if isinstance(kind, ClassLabel)), None)
    if column is None:
        return None
    feature = table.features[column]
    dtype = str(getattr(feature, "dtype", ""))
    if not (dtype.startswith(("int", "uint")) or dtype in ("bool", "string", "large_string")):
        return None
    values = table.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    if isinstance(feature, ClassLabel):
        names = tuple(feature.names)
    return encode_labels(source, values, names)


def encode_labels(source: str, values: Sequence[Any], names: tuple[str, ...] | None = None) -> Labels:
    """Convert label values to codes.

    Numeric values are indices in `names` if `names` is given; otherwise the sorted values become the names. A missing
    value, or a negative number (which the hub uses for "unknown"), gets the code -1.

    Raises:
        DataError: a value has no name in `names`.
    """
    is_missing = [value is None or (not isinstance(value, str) and value < 0) for value in values]
    distinct = {value for value, missing in zip(values, is_missing, strict=True) if not missing}
    if names is not None and not any(isinstance(value, str) for value in distinct):
        if distinct and max(distinct) >= len(names):
            raise DataError(f"--data '{source}': label {max(distinct)}, but there are only {len(names)} class names.")
        code_of = {value: int(value) for value in distinct}
    else:
        ordered = sorted(distinct)
        code_of = {value: code for code, value in enumerate(ordered)}
        names = tuple(str(value) for value in ordered)
    codes = (-1 if missing else code_of[value] for value, missing in zip(values, is_missing, strict=True))
    return Labels(np.fromiter(codes, dtype=np.int64, count=len(values)), names)


def _class_names(path: Path) -> tuple[str, ...] | None:
    """Return the lines of `classes.txt`, in label order. Lines "id<tab>name" give the name, if all names differ."""
    if not path.is_file():
        return None
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    names = [line.rpartition("\t")[2] for line in lines]
    return tuple(names if len(set(names)) == len(names) else lines)


def _first_line(error: Exception) -> str:
    cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    return first_line(cause).rstrip(".")
