"""Images in tables: parquet files and data sets of the Hugging Face hub, both read through `datasets`.

`datasets` writes an Arrow copy into its cache once and maps it into memory: rows are then read at random, and
all processes share the pages. Images stay encoded in it (`decode=False`); `pecobook.data.decode` decodes
them.
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
from pecobook.data.source import Integers, Labels, Part, group_by_split, names_under
from pecobook.errors import DataError, did_you_mean, first_line


class TableStore:
    """One column of encoded images.

    Args:
        images: a `datasets.Dataset` with the one column `column`: {bytes, path} or binary.
        column: its name.
        files: (name, number of rows) of the files the rows come from, in order.
        identity: what makes the rows this set's and no other's; goes into the fingerprint.
    """

    def __init__(self, images: Any, column: str, files: Sequence[tuple[str, int]], identity: str) -> None:
        self._images, self._column, self._identity = images, column, identity
        self._names = [name for name, _ in files]
        self._starts = np.cumsum([0, *(rows for _, rows in files)])

    def __len__(self) -> int:
        return len(self._images)

    def identify(self, row: int) -> str:
        """The file and the row in it."""
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self._names[file]} row {row - self._starts[file]}"

    def read(self, row: int) -> Tensor:
        """The image, uint8 (3, H, W)."""
        return decode(self.encoded(row), name=self.identify(row))

    def encoded(self, row: int) -> bytes:
        """The image's bytes as they are stored; raises BadImage."""
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
        """A hash of the files' names and sizes and of the rows' numbers."""
        return hashlib.sha256(self._identity.encode() + rows.astype("<i8").tobytes()).hexdigest()


def parquet_parts(source: str, files: list[Path], *, root: Path | None = None) -> dict[str, Part]:
    """The splits of parquet files: column `image` ({bytes, path} or binary), optional `label`.

    Labels take their names from the Hugging Face schema metadata, else from the lines of a `classes.txt`
    beside the first file, else they are the sorted values themselves. Names of files, and of their
    folders, declare splits; a single file is all there is, whatever its name, and 10% of it is held out.

    Raises:
        DataError: a file cannot be read or has no image column.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import load_dataset

    parts: dict[str, Part] = {}
    for split, numbers in group_by_split(names_under(files, root)).items():
        mine = [files[number] for number in numbers]
        try:
            counts = [pq.read_metadata(file).num_rows for file in mine]
            schema = pq.read_schema(mine[0])
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"--data '{source}': a parquet file cannot be read: {_first_line(error)}.") from error
        if "image" not in schema.names:
            raise DataError(_no_image_column(f"{source}' ('{mine[0].name}')", schema.names))
        try:
            paths = [glob.escape(str(file)) for file in mine]  # datasets takes them for patterns
            table = load_dataset("parquet", data_files={split: paths}, split=split)
        except Exception as error:  # datasets wraps whatever Arrow raises in errors of its own
            raise DataError(f"--data '{source}': the parquet files of {split}: {_first_line(error)}.") from error
        identity = repr([(file.name, file.stat().st_size) for file in mine])
        rows = [(str(file), count) for file, count in zip(mine, counts, strict=True)]
        names = _class_names(mine[0].with_name("classes.txt"))
        parts[split] = _part(source, table, "image", rows, identity, names)
    return parts


def hub_parts(source: str) -> dict[str, Part]:
    """The splits of `hf:owner/name[:config]`: the column `image` or the first image column, `label` or the first
    ClassLabel.

    Raises:
        DataError: the data set cannot be had, whatever the reason, or has no image column.
    """
    parts: dict[str, Part] = {}
    for split, (name, config, declared, table) in hub_tables(source).items():
        column = _image_column(source, table.features)
        identity = repr((name, config, declared, len(table), sorted(table.features)))
        parts[split] = _part(source, table, column, [(f"{name} {declared}", len(table))], identity, None)
    return parts


def hub_tables(source: str) -> dict[str, tuple[str, str, str, Any]]:
    """Of `hf:owner/name[:config]`, by split: owner/name, config, the hub's name of the split, and its table.

    Raises:
        DataError: the data set cannot be had, whatever the reason.
    """
    from datasets import load_dataset

    name, _, config = source.removeprefix("hf:").partition(":")
    try:
        loaded = load_dataset(name, config or None)
    except Exception as error:  # network, hub, gated, unknown name, builder: each library raises its own
        raise DataError(
            f"--data '{source}' cannot be loaded from the Hugging Face hub: {_first_line(error)}\n"
            "Check the name (hf:owner/name or hf:owner/name:config), the network, and access if it is gated."
        ) from error
    names = list(loaded)
    found = {}
    for split, numbers in group_by_split(names).items():
        # "train" and not "train_extra": splits that may overlap must not be joined.
        declared = min((names[number] for number in numbers), key=len)
        found[split] = (name, config, declared, loaded[declared])
    return found


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
    near = did_you_mean("image", columns)
    return (
        f"--data '{where} has no column 'image'; it has {', '.join(columns)}.{near}\n"
        "Rename the column that holds the encoded images to 'image'."
    )


def _labels(source: str, table: Any, names: tuple[str, ...] | None) -> Labels | None:
    """The label column as codes; None when there is none, or when its values are no classes."""
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
    return number_labels(source, values, names)


def number_labels(source: str, values: Sequence[Any], names: tuple[str, ...] | None = None) -> Labels:
    """Labels as codes: numbers in `names` where they are numbers and names are known, else in the sorted
    values.

    A missing value, and a negative number as the hub uses for "unknown", gets code -1.
    """
    unknown = [value is None or (not isinstance(value, str) and value < 0) for value in values]
    known = {value for value, missing in zip(values, unknown, strict=True) if not missing}
    if names is not None and not any(isinstance(value, str) for value in known):
        if known and max(known) >= len(names):
            raise DataError(f"--data '{source}': label {max(known)}, but there are only {len(names)} class names.")
        codes = {value: int(value) for value in known}
    else:
        ordered = sorted(known)
        codes = {value: code for code, value in enumerate(ordered)}
        names = tuple(str(value) for value in ordered)
    numbers = (-1 if missing else codes[value] for value, missing in zip(values, unknown, strict=True))
    return Labels(np.fromiter(numbers, dtype=np.int64, count=len(values)), names)


def _class_names(path: Path) -> tuple[str, ...] | None:
    """Lines of `classes.txt`, in label order; of "id<tab>name" the name, unless two ids share it."""
    if not path.is_file():
        return None
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    names = [line.rpartition("\t")[2] for line in lines]
    return tuple(names if len(set(names)) == len(names) else lines)


def _first_line(error: Exception) -> str:
    cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    return first_line(cause).rstrip(".")
