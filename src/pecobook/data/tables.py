"""Reads images from parquet files and from data sets of the Hugging Face hub, both with the library `datasets`.

`datasets` writes an Arrow copy to its cache once and maps this copy into memory. Rows can then be read in any order,
and all processes share the memory pages. The images in the copy stay encoded (`decode=False`); `pecobook.data.decode`
decodes them.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from pecobook.data.decode import BadImage, Range, decode, read_file
from pecobook.data.source import Contents, Integers, Labels, Part, file_version, hash_some, relative_names
from pecobook.data.split_names import group_by_split, note_ignored_splits
from pecobook.errors import DataError, did_you_mean, first_line

_TEXTS = ("string", "large_string", "string_view")


class TableStore:
    """One column of encoded images.

    Args:
        images: a `datasets.Dataset` with a single column: binary, {bytes, path}, or paths as text. A relative path is
            looked up beside the file that holds the row.
        column: the name of the column.
        files: (name, number of rows) of the files that hold the rows, in order.
        identity: text that identifies the table; it goes into the fingerprint.
    """

    value_range: Range | None = None

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

    def read(self, row: int) -> Tensor:
        """Read and decode the image of a row: uint8 (3, H, W)."""
        return decode(self.encoded(row), name=self.identify(row), value_range=self.value_range)

    def encoded(self, row: int) -> bytes:
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
        if "://" in path:
            raise BadImage(self.identify(row), f"{path} is an address, not a file; download the images first")
        try:
            return read_file(self._file(row, path))
        except BadImage as error:
            raise BadImage(self.identify(row), str(error)) from error

    def _file(self, row: int, path: str) -> Path:
        """Return the file of a path that a row holds."""
        folder = Path(self._names[self._file_of(row)]).parent
        file = folder / path
        if "\\" in path and not file.is_file():  # written on Windows
            file = folder / path.replace("\\", "/")
        return file

    @property
    def num_bytes(self) -> int:
        """The bytes of all encoded images."""
        import pyarrow.compute as pc

        column = self._images.data.column(self._column)
        return (
            pc.sum(pc.binary_length(pc.struct_field(column, "bytes") if column.type.num_fields else column)).as_py()
            or 0
        )

    def files(self, rows: Integers) -> Iterator[bytes]:
        """Yield the paths of the tables, and of the image files where the tables hold paths."""
        import pyarrow.compute as pc

        numbers = np.unique(np.searchsorted(self._starts, rows, side="right") - 1)
        yield from (os.fsencode(self._names[number]) for number in numbers)
        column = self._images.data.column(self._column)
        if column.type.num_fields:
            column = pc.if_else(pc.is_null(pc.struct_field(column, "bytes")), pc.struct_field(column, "path"), None)
        if str(column.type) not in _TEXTS or column.null_count == len(column):
            return
        for row, path in zip(rows.tolist(), column.take(rows).to_pylist(), strict=True):
            if path and "://" not in path:
                yield os.fsencode(self._file(row, path))

    def digest(self, rows: Integers) -> str:
        """Return a hash of the files' names, sizes and footers, of the row numbers, and of the bytes of some images."""
        digest = hash_some(self.encoded, rows)
        digest.update(self._identity.encode() + rows.astype("<i8").tobytes())
        return digest.hexdigest()


def parquet_contents(source: str, files: list[Path], *, root: Path | None = None) -> Contents:
    """Return the splits of parquet files with a column `image` and optionally `label`.

    An image is {bytes, path}, binary, or the path of an image file. The class names come from the Hugging Face metadata
    of the schema, else from the lines of a `classes.txt` next to the first file; otherwise the sorted label values are
    the names. The names of the files and of their folders declare splits. A single file is the training set whatever
    its name is, and 10% of its images are held out.

    Raises:
        DataError: a file cannot be read or has no image column.
    """
    names = relative_names(files, root)
    groups, unused = group_by_split(names)
    footers = [_read_footer(source, file) for file in files]
    parts: dict[str, Part] = {}
    for split, all_numbers in groups.items():
        numbers = [number for number in all_numbers if footers[number].num_rows]  # `datasets` cannot read no rows
        if not numbers and split == "train":
            raise DataError(f"--data '{source}': '{files[all_numbers[0]]}' has no rows.")
        if not numbers:
            continue
        split_files = [files[number] for number in numbers]
        schemas = [footers[number].schema.to_arrow_schema() for number in numbers]
        if "image" not in schemas[0].names:
            raise DataError(_no_image_column(f"{source}' ('{split_files[0].name}')", schemas[0].names))
        table = _load_parquet(source, split, split_files, schemas)
        identity = repr([(file.name, *_content_key(file)) for file in split_files])
        rows = [(str(files[number]), footers[number].num_rows) for number in numbers]
        class_names = _class_names(split_files[0].with_name("classes.txt"))
        parts[split] = _part(source, table, "image", rows, identity, class_names)
    num_unused = sum(footers[number].num_rows for number in unused)
    left_out = {"in files that name no split, beside files that do": num_unused} if num_unused else {}
    class_files = {files[numbers[0]].with_name("classes.txt") for numbers in groups.values() if numbers}
    found = tuple(file for file in sorted(class_files) if file.is_file())
    return Contents(parts, left_out, note_ignored_splits(names, groups), found)


def _read_footer(source: str, file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"--data '{source}': '{file}' cannot be read as parquet: {_first_line(error)}.") from error


def _load_parquet(source: str, split: str, files: list[Path], schemas: list[Any]) -> Any:
    """Load files through the cache of `datasets`.

    `datasets` recognises a file by path and time alone, and would return old rows for a file that was replaced without
    a new time; so the versions of the files name a folder of the cache.
    """
    import datasets

    paths = [glob.escape(str(file)) for file in files]  # datasets treats paths as patterns
    try:
        versions = hashlib.sha256("\n".join(map(file_version, files)).encode()).hexdigest()[:16]
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "pecobook" / versions
        return datasets.load_dataset("parquet", data_files={split: paths}, split=split, cache_dir=str(cache))
    except Exception as error:  # datasets wraps all errors of Arrow in exceptions of its own
        raise DataError(
            f"--data '{source}': the parquet files of {split} cannot be loaded: {_first_line(error)}."
            f"{_differences(files, schemas)}"
        ) from error


def _differences(files: list[Path], schemas: list[Any]) -> str:
    """Return a sentence on a column that does not have the same type in all files; an empty text if there is none."""
    for file, schema in zip(files, schemas, strict=True):
        for name, kind in zip(schema.names, schema.types, strict=True):
            first = schemas[0].field(name).type if name in schemas[0].names else None
            if first is not None and first != kind:
                return f"\nThe column '{name}' holds {first} in '{files[0]}', but {kind} in '{file}': use one type."
    return ""


def _content_key(file: Path) -> tuple[int, str]:
    """Return the size of a parquet file and a hash of its footer, which holds the sizes and extremes of its columns."""
    with file.open("rb") as opened:
        size = opened.seek(0, 2)
        opened.seek(-8, 2)
        length = min(int.from_bytes(opened.read(4), "little") + 8, size)
        opened.seek(-length, 2)
        return size, hashlib.sha256(opened.read()).hexdigest()


def hub_contents(source: str) -> Contents:
    """Return the splits of a data set of the hub, `hf:owner/name[:config]`.

    The images are the column `image`, or else the first image column; the labels are the column `label`, or else the
    first ClassLabel column.

    Raises:
        DataError: the data set cannot be loaded for any reason, or has no image column.
    """
    parts: dict[str, Part] = {}
    tables, left_out, notes = load_hub(source)
    for split, (name, config, declared, table) in tables.items():
        column = _image_column(source, table.features)
        identity = repr((name, config, declared, len(table), sorted(table.features)))
        parts[split] = _part(source, table, column, [(f"{name} {declared}", len(table))], identity, None)
    return Contents(parts, left_out, notes)


def hub_tables(source: str) -> dict[str, tuple[str, str, str, Any]]:
    """Load a data set of the hub; see `load_hub`, of whose values this is the first."""
    return load_hub(source)[0]


def load_hub(source: str) -> tuple[dict[str, tuple[str, str, str, Any]], dict[str, int], tuple[str, ...]]:
    """Load a data set of the hub, `hf:owner/name[:config]`.

    Returns:
        (owner/name, config, the hub's name of the split, the table of the split) for each split; what is left out, and
        notes, as in `Splits`.

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
    groups, _ = group_by_split(names)
    for split, numbers in groups.items():
        # "train" without "train_extra", because splits that may overlap must not be joined.
        declared = min((names[number] for number in numbers), key=len)
        tables[split] = (name, config, declared, loaded[declared])
    used = {table[2] for table in tables.values()}
    left_out = {f"in the hub's split '{other}'": len(loaded[other]) for other in names if other not in used}
    return tables, left_out, note_ignored_splits(names, groups)


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
            "it must hold encoded images, as binary or as {bytes, path}, or the paths of image files."
        )
    store = TableStore(images, column, files, identity)
    labels, unlabelled = _labels(source, table, names, store)
    return Part(store, np.arange(len(images), dtype=np.int64), labels, unlabelled)


def _holds_bytes(feature: Any) -> bool:
    """Return whether a column holds encoded images, or paths of images."""
    fields = [feature.get("bytes"), feature.get("path")] if isinstance(feature, dict) else [feature]
    types = {getattr(field, "dtype", None) for field in fields} - {None, "null"}
    return bool(types) and types <= {"binary", "large_binary", "binary_view", *_TEXTS}


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


def _labels(source: str, table: Any, names: tuple[str, ...] | None, store: TableStore) -> tuple[Labels | None, str]:
    """Return the label column as codes; or None, and why, if there is none or its values cannot be classes."""
    from datasets import ClassLabel

    column = "label" if "label" in table.features else None
    if column is None:
        column = next((name for name, kind in table.features.items() if isinstance(kind, ClassLabel)), None)
    if column is None:
        return None, f"there is no column 'label', only {', '.join(table.features)}"
    feature = table.features[column]
    dtype = str(getattr(feature, "dtype", "")) if not isinstance(feature, (dict, list)) else ""
    if not (dtype.startswith(("int", "uint", "float")) or dtype in ("bool", "null", *_TEXTS)):
        return None, f"the column '{column}' holds {feature}, which is no class"
    values = table.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    if dtype.startswith("float"):  # as pandas stores whole numbers beside a missing one
        wrong = next((row for row, value in enumerate(values) if not is_missing(value) and value % 1), None)
        if wrong is not None:
            return None, f"the column '{column}' holds {values[wrong]} in {store.identify(wrong)}, which is no class"
        values = [None if is_missing(value) else int(value) for value in values]
    if isinstance(feature, ClassLabel):
        names = tuple(feature.names)
    return encode_labels(source, values, names, store.identify), ""


def is_missing(value: Any) -> bool:
    """Return whether a label stands for "unknown": None, NaN, a negative number, or an empty text."""
    return value is None or (not value.strip() if isinstance(value, str) else not value >= 0)


def encode_labels(
    source: str,
    values: Sequence[Any],
    names: tuple[str, ...] | None = None,
    identify: Callable[[int], str] | None = None,
) -> Labels:
    """Convert label values to codes; a missing value gets the code -1.

    If `names` is given, numbers are indices in it, and texts are sought in it. Otherwise, and if it lacks a text, the
    sorted values become the names.

    Args:
        source: the value of `--data`.
        values: the labels.
        names: the names of the classes.
        identify: returns the name of an image by its position in `values`, for the message of an error.

    Raises:
        DataError: a value has no name in `names`.
    """
    distinct = {value for value in values if not is_missing(value)}
    if names is not None and not any(isinstance(value, str) for value in distinct):
        wrong = [row for row, value in enumerate(values) if not is_missing(value) and value >= len(names)]
        if wrong:
            where = f" of {identify(wrong[0])}" if identify else ""
            raise DataError(
                f"--data '{source}': label {values[wrong[0]]}{where} ({len(wrong):,} like this), but there are only "
                f"{len(names)} class names."
            )
        code_of = {value: int(value) for value in distinct}
    elif names is not None and distinct <= set(names):
        code_of = {name: code for code, name in enumerate(names)}
    else:
        ordered = sorted(distinct)
        code_of = {value: code for code, value in enumerate(ordered)}
        names = tuple(str(value) for value in ordered)
    codes = (-1 if is_missing(value) else code_of[value] for value in values)
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
