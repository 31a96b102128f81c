"""Labels of images: the names of classes, and the codes that stand for them in a column of labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pecobook.data.parts import Labels
from pecobook.errors import ConfigError, DataError

_NUMBERED = re.compile(r"(\d{1,6})\s*[\s,;:=]\s*(\S.*)")


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
                f"{len(names)} class names, of the labels 0 to {len(names) - 1}."
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


def class_names(path: Path) -> tuple[str, ...] | None:
    """Return the names in `classes.txt`, in label order: a name on each line, "id<tab>name" or "label name".

    The id of "id<tab>name" is left out if all names differ. A name that stands there twice gets its label behind it.
    """
    if not path.is_file():
        return None
    lines = [
        line.strip() for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines() if line.strip()
    ]
    numbered = sorted((int(match[1]), match[2]) for line in lines if (match := _NUMBERED.fullmatch(line)))
    if [number for number, _ in numbered] == list(range(len(lines))):
        lines = [name for _, name in numbered]
    names = [line.rpartition("\t")[2] for line in lines]
    names = names if len(set(names)) == len(names) else lines
    return tuple(f"{name} ({label})" if names.count(name) > 1 else name for label, name in enumerate(names))


def class_indices(trained: Sequence[str], classes: Sequence[str], classifier: str, data: str) -> list[int]:
    """Return the index of each of the data's classes among those of a classifier, matched by name.

    Raises ConfigError, which names the classifier and the data, when the classifier does not have a class.
    """
    index_of = {label: index for index, label in enumerate(trained)}
    missing = [label for label in classes if label not in index_of]
    if missing:
        more = f" (and {len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise ConfigError(f"{classifier} does not have the class '{missing[0]}' of --data '{data}'{more}.")
    return [index_of[label] for label in classes]
