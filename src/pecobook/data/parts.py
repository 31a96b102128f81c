"""From the contents of a source to its splits: `Labels`, `Part`, `Contents` and `assemble`.

A `Part` is the rows of one declared split. The module for each kind of source (folders.py, tables.py, shards.py) makes
parts, and `assemble` turns them into `Splits`.

Labels are used if every image of a split has one and there are at least two classes. Otherwise the source counts as
unlabelled, and `ImageSource.unlabelled` names the images or the class responsible.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pecobook.data.source import ImageSource, Integers, Note, Splits, Store, hold_out, kind_of, unused_splits
from pecobook.errors import ConfigError, DataError, did_you_mean


@dataclass(frozen=True)
class Labels:
    """A column of labels: `codes`, int64 (n,), index into `names`; -1 marks an image without a label."""

    codes: Integers
    names: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """One declared split.

    Attributes:
        store: the images of all splits, or of this one.
        rows: the rows of the store that belong to the split.
        labels: the labels of these rows, or None.
        unlabelled: why `labels` is None, if there is more to say; a `Note` if the user gave labels.
        lacks_label: what is wrong with an image whose label is -1.
    """

    store: Store
    rows: Integers
    labels: Labels | None
    unlabelled: str = ""
    lacks_label: str = "have no label"

    def label_problem(self, split: str) -> str:
        """Return why the labels of `split` cannot be used; an empty string if they can be, or if there are none."""
        if self.labels is None or not len(self.rows):
            return self.unlabelled
        missing = np.flatnonzero(self.labels.codes < 0)
        if len(missing) == len(self.rows):
            return self.unlabelled or f"no {self.store.unit[:-1]} of {split} has one"
        if len(missing):
            first = self.store.identify(int(self.rows[missing[0]]))
            count = f"{len(missing):,} of {len(self.rows):,} {self.store.unit}"
            return Note(f"{count} of {split} {self.lacks_label}, the first: {first}", "lost labels")
        if split == "train" and len(self.labels.names) < 2:
            return Note(f"all {self.store.unit} of train have the one class '{self.labels.names[0]}'", "one class")
        return ""


@dataclass(frozen=True)
class Contents:
    """The contents of a source, before `assemble` chooses the evaluation split.

    Attributes:
        parts: "train" and further declared splits.
        left_out: see `Splits`.
        notes: see `Splits`.
        files: see `Splits`.
    """

    parts: Mapping[str, Part]
    left_out: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


def assemble(source: str, contents: Contents) -> Splits:
    """Make `Splits` from the part "train" and, if declared, the parts "test" and "validation"; large ones are mapped.

    Raises:
        DataError: there is no training image, or training lacks a class of the evaluation split.
    """
    splits = _assembled(source, contents)
    for part in (splits.train, splits.evaluation):
        part.map()
    return splits


def _assembled(source: str, contents: Contents) -> Splits:
    parts = contents.parts
    if len(parts["train"].rows) == 0:
        raise DataError(f"--data '{source}': the training split holds no {parts['train'].store.unit}.")
    notes = list(contents.notes)

    def usable_labels(name: str) -> tuple[Labels | None, str]:
        problem = parts[name].label_problem(name)
        if problem and (isinstance(problem, Note) or name != "train"):
            notes.append(Note(f"The labels of {name} are not used: {problem}.", kind_of(problem) or "lost labels"))
        return (None if problem else parts[name].labels), problem

    def source_of(name: str, split: str, codes: Integers | None, problem: str) -> ImageSource:
        part = parts[name]
        images = ImageSource(part.store, name=source, split=split, rows=part.rows, classes=classes, labels=codes)
        images.unlabelled = problem
        return images

    labels, problem = usable_labels("train")
    classes = labels.names if labels else None
    training = source_of("train", "train", labels.codes if labels else None, problem)
    candidates = [name for name in ("test", "validation") if name in parts and len(parts[name].rows)]
    if not candidates:
        return replace(hold_out(training), left_out=contents.left_out, notes=tuple(notes), files=contents.files)
    labelled = [name for name in candidates if (given := parts[name].labels) and (given.codes >= 0).any()]
    chosen = labelled[0] if classes is not None and labelled else candidates[0]
    labels, problem = usable_labels(chosen) if classes else (None, "")
    codes = _renumber(source, chosen, labels, classes) if classes else None
    evaluation = source_of(chosen, "evaluation", codes, problem)
    unused = unused_splits({name: len(part.rows) for name, part in parts.items()}, chosen)
    return Splits(training, evaluation, chosen, contents.left_out | unused, tuple(notes), contents.files)


def _renumber(source: str, split: str, labels: Labels | None, classes: tuple[str, ...]) -> Integers | None:
    """Convert the labels of the evaluation split to indices in the training classes."""
    if labels is None:
        return None
    code_of = {name: code for code, name in enumerate(classes)}
    missing = [labels.names[code] for code in np.unique(labels.codes) if labels.names[code] not in code_of]
    if missing:
        raise DataError(
            f"--data '{source}': class '{missing[0]}' of {split} is missing in train"
            f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}."
            f"{did_you_mean(missing[0], classes)}\n"
            f"Every class of {split} must exist in train: add the class to train or remove it from {split}."
        )
    table = np.array([code_of.get(name, -1) for name in labels.names], dtype=np.int64)
    return np.asarray(table[labels.codes])


# ------------------------------------------------------------------------------------------------- from labels to codes

_NUMBERED = re.compile(r"(\d{1,6})\s*[\s,;:=]\s*(\S.*)")


def is_missing(value: Any) -> bool:
    """Return whether a label means "unknown": None, NaN, a negative number, or an empty string."""
    return value is None or (not value.strip() if isinstance(value, str) else not value >= 0)


def encode_labels(
    source: str,
    numbers: Integers,
    values: Sequence[Any],
    names: tuple[str, ...] | None = None,
    identify: Callable[[int], str] | None = None,
) -> Labels:
    """Convert labels to codes; a missing value gets the code -1.

    If `names` is given, numbers are indices into it, and texts are looked up in it. Otherwise, and if it lacks a text,
    the sorted values become the names.

    Args:
        source: the value of `--data`.
        numbers: for each image, the position of its label in `values`; -1 without one.
        values: the distinct labels, some of which may belong to no image.
        names: the names of the classes.
        identify: returns an image's name from its position in `numbers`, for error messages.

    Raises:
        DataError: a value has no name in `names`.
    """
    values = [one_form(value) if isinstance(value, str) else value for value in values]
    used = np.bincount(numbers + 1, minlength=len(values) + 1)[1:] > 0
    given = [value if is_used and not is_missing(value) else None for value, is_used in zip(values, used, strict=True)]
    distinct = {value for value in given if value is not None}
    if names is not None and not any(isinstance(value, str) for value in distinct):
        wrong = first_and_count(numbers, [value is not None and value >= len(names) for value in given])
        if wrong is not None:
            where = f" of {identify(wrong[0])}" if identify else ""
            raise DataError(
                f"--data '{source}': label {given[numbers[wrong[0]]]}{where} ({wrong[1]:,} like this), but there are "
                f"only {len(names)} class names, of the labels 0 to {len(names) - 1}."
            )
        code_of = {value: int(value) for value in distinct}
    elif names is not None and distinct <= set(names):
        code_of = {name: code for code, name in enumerate(names)}
    else:
        ordered = sorted(distinct)
        code_of = {value: code for code, value in enumerate(ordered)}
        names = tuple(str(value) for value in ordered)
    table = [-1 if value is None else code_of[value] for value in given]
    return Labels(np.array([*table, -1], dtype=np.int64)[numbers], names)


def first_and_count(numbers: Integers, wrong: Sequence[bool]) -> tuple[int, int] | None:
    """Return the first image with a wrong label, and how many there are; None without one.

    Args:
        numbers: see `encode_labels`.
        wrong: whether each of the distinct labels is wrong.
    """
    rows = np.flatnonzero(np.array([*wrong, False])[numbers]) if any(wrong) else np.zeros(0, np.int64)
    return (int(rows[0]), len(rows)) if len(rows) else None


def distinct_values(column: Any) -> tuple[Integers, list[Any]]:
    """Return an Arrow column's distinct values, and for each row the position of its value, -1 without one."""
    encoded = column.dictionary_encode().combine_chunks()
    encoded = encoded.chunk(0) if hasattr(encoded, "chunk") else encoded
    return encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64), encoded.dictionary.to_pylist()


def class_names(path: Path) -> tuple[str, ...] | None:
    """Return the names in `classes.txt`, in label order: one name per line, "id<tab>name" or "label name".

    The id of "id<tab>name" is dropped if all names differ. A duplicate name gets its label appended. Raises DataError
    if the file cannot be read.
    """
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8: save it so"
        raise DataError(f"'{path}', the names of the classes, cannot be read: {reason}.") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    numbered = sorted((int(match[1]), match[2]) for line in lines if (match := _NUMBERED.fullmatch(line)))
    if [number for number, _ in numbered] == list(range(len(lines))):
        lines = [name for _, name in numbered]
    names = [line.rpartition("\t")[2] for line in lines]
    return distinct_names(names if len(set(names)) == len(names) else lines)


def one_form(name: str) -> str:
    """Return a class name with its accents as most programs write them: macOS separates them from their letters."""
    return unicodedata.normalize("NFC", name)


def distinct_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the class names in label order; a duplicate name gets its label appended."""
    names = list(map(one_form, names))
    counts = Counter(names)
    return tuple(f"{name} ({label})" if counts[name] > 1 else name for label, name in enumerate(names))


def class_indices(trained: Sequence[str], classes: Sequence[str], classifier: str, data: str) -> list[int]:
    """Return the index of each of the data's classes among a classifier's, matched by name.

    Raises ConfigError, which names the classifier and the data, if the classifier lacks a class.
    """
    index_of = {one_form(label): index for index, label in enumerate(trained)}
    classes = list(map(one_form, classes))
    missing = [label for label in classes if label not in index_of]
    if missing:
        more = f" (and {len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise ConfigError(f"{classifier} does not have the class '{missing[0]}' of --data '{data}'{more}.")
    return [index_of[label] for label in classes]
