"""The only reader of the JSON files that pecobook writes. Users edit and disks damage them, so it checks every field.

A schema assigns a kind to each field of a file: one of the kinds below, or a schema for a nested object.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeGuard

from pecobook.errors import PecobookError, RunFolderError, first_line


class Kind(NamedTuple):
    """A kind of value."""

    words: str
    """A description of such a value, with an article."""
    holds: Callable[[Any], bool]
    optional: bool = False
    """Whether the field may be missing or null."""

    @property
    def or_none(self) -> Kind:
        """The same kind, for a field that may be missing or null."""
        return self._replace(optional=True)


Schema: TypeAlias = Mapping[str, "Kind | Schema"]


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < 2**63


ANY = Kind("a value", lambda value: value is not None)
WHOLE = Kind("a whole number above 0", lambda value: _is_whole(value, 1))
COUNT = Kind("a whole number of 0 or above", lambda value: _is_whole(value, 0))
NUMBER = Kind("a finite number", is_number)
TEXT = Kind("a text", lambda value: isinstance(value, str))
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def list_of(kind: Kind, length: int | None = None) -> Kind:
    """Return the kind of a list whose values are of one kind."""
    number = "" if length is None else f"{length} times "
    return Kind(
        f"a list of {number}{kind.words}",
        lambda value: isinstance(value, list) and length in (None, len(value)) and all(map(kind.holds, value)),
    )


def read_json(
    file: Path,
    schema: Schema | Callable[[dict[str, Any]], Schema] | None = None,
    *,
    error: type[PecobookError] = RunFolderError,
    remedy: str = "",
) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        file: the file.
        schema: the kinds of the fields that the file must have, or a function that chooses them from the content; the
            file may have more.
        error: the class of the error.
        remedy: what the user can do, used as the end of the message.

    Raises:
        FileNotFoundError: there is no such file.
        PecobookError: of the class `error`: the file cannot be read, contains no JSON object, or lacks a field.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(file) from None
    except (OSError, ValueError, RecursionError) as cause:
        problem = f"cannot be read: {first_line(cause).rstrip('.')}"
    else:
        problem = "does not hold a JSON object"
        if isinstance(content, dict):
            problem = _problem(content, schema(content) if callable(schema) else schema or {})
    if problem:
        raise error(f"'{file}' {problem}. {remedy}".rstrip())
    return dict(content)


def parse_json(text: str) -> Any:
    """Return the value of a JSON string. Raises ValueError, also for a duplicate name in an object."""
    return json.loads(text, object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{repeated}' stands there twice: keep one")
    return value


def parse_object(text: str) -> dict[str, Any]:
    """Return the JSON object in a string. Raises ValueError if there is none."""
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    return content


def read_if_valid(file: Path, schema: Schema | None = None) -> dict[str, Any] | None:
    """Read a JSON object as `read_json` does; return None if the file is missing or unusable."""
    try:
        return read_json(file, schema)
    except (FileNotFoundError, PecobookError):
        return None


def _problem(content: dict[str, Any], schema: Schema, prefix: str = "") -> str:
    """Return what is wrong with the first wrong field, or an empty string."""
    for name, kind in schema.items():
        value, full = content.get(name), f"{prefix}{name}"
        if isinstance(kind, Mapping):
            if not isinstance(value, dict):
                return f"has no object '{full}'"
            if problem := _problem(value, kind, f"{full}."):
                return problem
        elif value is None and not kind.optional:
            return f"has no '{full}', {kind.words}"
        elif value is not None and not kind.holds(value):
            return f"has '{full}' {json.dumps(value)[:80]}, which is not {kind.words}"
    return ""


_LINE_START = '{"step": '
"""The beginning of every line of a metrics.jsonl."""


def metric_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the lines of a metrics.jsonl and their values; lines that a crash cut off or damaged are left out.

    A line that was cut off while an evaluation was added to it is returned as it was before. Another line may
    follow the cut without a line break.
    """
    lines = []
    content = path.read_text(encoding="utf-8", errors="replace")
    for text in content.replace(_LINE_START, "\n" + _LINE_START).splitlines():
        before = text.partition(', "evaluation/')[0].rstrip(", ") + "}"
        for line in (text,) if text.endswith("}") else (before, before.rpartition(", ")[0] + "}"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            # A line that a crash has cut off may hold its step only.
            if isinstance(record, dict) and _is_whole(record.get("step"), 0) and (line is text or len(record) > 1):
                lines.append((line, record))
                break
    return lines


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, one per logged step, without those that a crash damaged."""
    return [record for _, record in metric_lines(path)]


def evaluation_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of the evaluation at a logged step, by name without `evaluation/`; empty if there was none."""
    prefix = "evaluation/"
    return {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}


def last_evaluated(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the last record of a metrics.jsonl that has an evaluation; None if no record has one."""
    return next(filter(evaluation_of, reversed(records)), None)


def last_evaluation(run: Path) -> dict[str, Any]:
    """Return the results of the last evaluation of a finished run, by name without `evaluation/`.

    Raises:
        RunFolderError: metrics.jsonl is missing, or damaged so that it holds no evaluation.
    """
    file = run / "metrics.jsonl"
    record = last_evaluated(read_metrics(file) if file.is_file() else ())
    if record is None:
        remedy = f"Delete '{run / 'export'}' and start again: only the evaluation is repeated."
        raise RunFolderError(f"'{file}' is missing or damaged: it holds no evaluation. {remedy}")
    return evaluation_of(record)
