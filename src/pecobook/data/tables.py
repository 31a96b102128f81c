"""Opens parquet files and data sets of the Hugging Face hub, both with the library `datasets`.

`datasets` writes an Arrow copy to its cache once and maps this copy into memory. Rows can then be read in any order,
and all processes share the memory pages. The images in the copy stay encoded (`decode=False`); `pecobook.data.decode`
decodes them.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pecobook.data.names import group_by_split, note_ignored_splits
from pecobook.data.parts import (
    Contents,
    Labels,
    Part,
    class_names,
    distinct_names,
    distinct_values,
    encode_labels,
    first_and_count,
    is_missing,
)
from pecobook.data.remote import RemotePath
from pecobook.data.remote_tables import RowGroupStore, read_columns
from pecobook.data.source import Note, file_version, relative_names
from pecobook.data.table_store import TableStore, content_key, damage, differences, store_of_column
from pecobook.errors import DataError, did_you_mean, first_line
from pecobook.utils.printer import say

_TEXTS = ("string", "large_string", "string_view")
_LARGE = 2**30
"""Minimum size of files, in bytes, for which the copy is announced."""
_BATCH = 10_000
"""Rows per batch of the copy: each takes 2 kB in every process, and `datasets` alone makes one per 100 images."""


def parquet_contents(source: str, files: list[Path], root: Path | None = None) -> Contents:
    """Return the splits of parquet files with a column `image` and optionally `label`.

    An image is {bytes, path}, binary, or the path of an image file. The class names come from the Hugging Face metadata
    of the schema, or else from the lines of a `classes.txt` next to the first file; otherwise the sorted label values
    are the names. The names of the files and of their folders declare splits. A single file is the training set
    whatever its name is, and 10% of its images are held out.

    Raises:
        DataError: a file cannot be read or has no image column.
    """
    names = relative_names(files, root)
    groups, unused = group_by_split(names)
    footers = [_read_footer(source, file) for file in files]
    parts: dict[str, Part] = {}
    left_out: dict[str, int] = {}
    for split, all_numbers in groups.items():
        numbers = [number for number in all_numbers if footers[number].num_rows]  # `datasets` cannot read 0 rows
        if not numbers and split == "train":
            raise DataError(f"--data '{source}': '{files[all_numbers[0]]}' has no rows.")
        if not numbers:
            continue
        split_files = [files[number] for number in numbers]
        schemas = [footers[number].schema.to_arrow_schema() for number in numbers]
        columns, unlabelled = _used_columns(source, split_files, schemas)
        identity = repr([(file.name, *content_key(file)) for file in split_files])
        rows = [(str(files[number]), footers[number].num_rows) for number in numbers]
        remote = [file for file in split_files if isinstance(file, RemotePath)]
        if remote:
            _check_images(source, "image", _features(source, split_files[0], schemas[0])["image"])
            store: TableStore = RowGroupStore(remote, [footers[number] for number in numbers], "image", identity)
            table: Any = read_columns(remote, columns[1:]) if len(columns) > 1 else None
            parts[split] = _labelled(source, table, store, None, unlabelled)
        else:
            table = _load_parquet(source, split, split_files, schemas, columns)
            classes = class_names(split_files[0].with_name("classes.txt"))
            parts[split] = _part(source, table, "image", rows, identity, classes, unlabelled)
        if "split" in columns and len(groups) == 1:
            parts, left_out = _parts_by_column(parts[split], table.select_columns(["split"])["split"])
    if num_unused := sum(footers[number].num_rows for number in unused):
        left_out["in files that name no split, beside files that do"] = num_unused
    class_files = {files[numbers[0]].with_name("classes.txt") for numbers in groups.values() if numbers}
    found = tuple(file for file in sorted(class_files) if file.is_file())
    return Contents(parts, left_out, note_ignored_splits(names, parts), found)


def _used_columns(source: str, files: list[Path], schemas: list[Any]) -> tuple[list[str], str]:
    """Return the columns to read, and why there are no labels if there are none."""

    def without_one(column: str) -> int | None:
        """Return the index of the first file that has no such column, or several of them."""
        return next((n for n, schema in enumerate(schemas) if schema.names.count(column) != 1), None)

    wrong = without_one("image")
    if wrong is not None:
        raise DataError(_no_image_column(f"{source}' ('{files[wrong].name}')", schemas[wrong].names))
    columns = ["image"] if without_one("split") is not None else ["image", "split"]
    label = _label_column(_features(source, files[0], schemas[0]))
    label = "label" if any("label" in schema.names for schema in schemas) else label
    if label is None:
        return columns, _no_label_column(schemas[0].names)
    wrong = without_one(label)
    if wrong is not None:
        reason = f"'{files[wrong]}' does not have one column '{label}' as other files have"
        return columns, Note(reason, "lost labels")
    return [*columns, label], ""


def _features(source: str, file: Path, schema: Any) -> Any:
    """Return the types of a file's columns. Raises DataError if another version of `datasets` described them."""
    from datasets import Features

    try:
        return Features.from_arrow_schema(schema)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"--data '{source}': what '{file}' says of its columns cannot be read: {_first_line(error)}.\n"
            "Update `datasets`, or write the file without it (PyArrow's table.replace_schema_metadata())."
        ) from error


def _parts_by_column(part: Part, names: Sequence[Any]) -> tuple[dict[str, Part], dict[str, int]]:
    """Divide a table's rows by the splits that a column names, if these are training and held-out images."""
    distinct = sorted({str(name) for name in names})
    groups, unused = group_by_split(distinct)
    number_of = {name: number for number, name in enumerate(distinct)}
    numbers = np.array([number_of[str(name)] for name in names])
    parts = {}
    for split, chosen in groups.items():
        is_used = np.isin(numbers, chosen)
        labels = part.labels and Labels(part.labels.codes[is_used], part.labels.names)
        parts[split] = replace(part, rows=part.rows[is_used], labels=labels)
    count = int(np.isin(numbers, unused).sum())
    return parts, {"whose column 'split' names no split": count} if count else {}


def _read_footer(source: str, file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(file.open("rb") if isinstance(file, RemotePath) else file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"--data '{source}': '{file}' cannot be read as parquet: {_first_line(error)}.") from error


def _load_parquet(source: str, split: str, files: list[Path], schemas: list[Any], columns: list[str]) -> Any:
    """Load columns of files through the cache of `datasets`.

    `datasets` identifies a file only by path and time, and would return old rows for a file replaced without a new
    time; the files' versions therefore name a cache folder.
    """
    import datasets

    paths = [glob.escape(str(file)) for file in files]  # datasets treats paths as patterns
    try:
        versions = hashlib.sha256("\n".join(map(file_version, files)).encode()).hexdigest()[:16]
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "pecobook" / versions
        size = sum(file.stat().st_size for file in files)
        if size > _LARGE and not cache.exists():
            say(
                f"Copying {size / 1e9:.1f} GB of parquet files to the cache {cache}, once. "
                f"--data 'file://{Path(source).expanduser().absolute()}' reads them where they are."
            )
        with _quiet():
            return datasets.load_dataset(
                "parquet",
                data_files={split: paths},
                split=split,
                columns=columns,
                cache_dir=str(cache),
                writer_batch_size=_BATCH,
            )
    except Exception as error:  # datasets wraps all Arrow errors in its own exceptions
        raise DataError(
            f"--data '{source}': the parquet files of {split} cannot be loaded: {_first_line(error)}."
            f"{differences(files, schemas, columns) or damage(files, columns)}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Turn off the progress bars and messages of `datasets`, whose errors are reported in our own words."""
    import datasets

    level, has_bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if has_bars:
            datasets.enable_progress_bars()


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
        unlabelled = "" if _label_column(table.features) else _no_label_column(table.features)
        parts[split] = _part(source, table, column, [(f"{name} {declared}", len(table))], identity, None, unlabelled)
    return Contents(parts, left_out, notes)


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
    except Exception as error:  # network, hub, gated, unknown name, builder: each library raises its own exceptions
        raise DataError(
            f"--data '{source}' cannot be loaded from the Hugging Face hub: {_first_line(error)}\n"
            "Check the name (hf:owner/name or hf:owner/name:config), the network, and your access to a gated data set; "
            f"without room for a copy, --data hf://datasets/{name} reads its parquet files where they are."
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
    unlabelled: str,
) -> Part:
    _check_images(source, column, table.features[column])
    return _labelled(source, table, store_of_column(table, column, files, identity), names, unlabelled)


def _labelled(source: str, table: Any, store: TableStore, names: tuple[str, ...] | None, unlabelled: str) -> Part:
    labels, unlabelled = (None, unlabelled) if unlabelled else _labels(source, table, names, store)
    return Part(store, np.arange(len(store), dtype=np.int64), labels, unlabelled)


def _check_images(source: str, column: str, feature: Any) -> None:
    """Raise DataError unless a column holds encoded images, or paths of images."""
    from datasets import Image

    if not isinstance(feature, Image) and not _holds_bytes(feature):
        raise DataError(
            f"--data '{source}': the column '{column}' holds {feature}; "
            "it must hold encoded images, as binary or as {bytes, path}, or the paths of image files."
        )


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
    number = "no" if "image" not in columns else "more than one"
    return (
        f"--data '{where} has {number} column 'image'; it has {', '.join(columns)}.{did_you_mean('image', columns)}\n"
        "Name the one column that holds the encoded images 'image'."
    )


def _label_column(features: Any) -> str | None:
    from datasets import ClassLabel

    if "label" in features:
        return "label"
    return next((name for name, kind in features.items() if isinstance(kind, ClassLabel)), None)


def _no_label_column(columns: Iterable[str]) -> str:
    """Return that there is no column of labels; as a note to show if another column seems to hold them."""
    reason = f"there is no column 'label', only {', '.join(columns)}"
    alike = next((name for name in columns if re.search("label|class|categor|target|species", name.lower())), None)
    return Note(f"{reason}: rename '{alike}' to 'label' if it holds the classes", "lost labels") if alike else reason


def _labels(source: str, table: Any, names: tuple[str, ...] | None, store: TableStore) -> tuple[Labels | None, str]:
    """Return the label column as codes; or None, and why, if its values cannot be classes."""
    from datasets import ClassLabel

    column = _label_column(table.features)
    assert column is not None
    feature = table.features[column]
    dtype = str(getattr(feature, "dtype", "")) if not isinstance(feature, (dict, list)) else ""
    if not (dtype.startswith(("int", "uint", "float")) or dtype in ("bool", "null", *_TEXTS)):
        return None, Note(f"the column '{column}' holds {feature}, which is no class", "lost labels")
    numbers, values = distinct_values(table.select_columns([column]).with_format("arrow")[:].column(column))
    if dtype.startswith("float"):  # as pandas stores integers if one is missing
        wrong = first_and_count(numbers, [not is_missing(value) and value % 1 != 0 for value in values])
        if wrong is not None:
            value, row = values[numbers[wrong[0]]], store.identify(wrong[0])
            return None, Note(f"the column '{column}' holds {value} in {row}, which is no class", "lost labels")
        values = [None if is_missing(value) else int(value) for value in values]
    if isinstance(feature, ClassLabel):
        names = distinct_names(feature.names)
    return encode_labels(source, numbers, values, names, store.identify), ""


def _first_line(error: Exception) -> str:
    cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
    return first_line(cause).rstrip(".")
