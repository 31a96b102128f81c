"""Checks, conversions and comparisons of settings, which come from flags, Python keywords or JSON.

A recipe (`pecobook.recipes`) is a settings object with all values; the command line and Python keywords replace single
values; `to_dict` returns the resolved settings of a run, and `load` reads them. No code is ever built from a string.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pecobook.errors import ConfigError, did_you_mean
from pecobook.settings.config_files import errors_with_lines, read_config

C = TypeVar("C")
# No setting accepts a larger number; settings that need a lower limit state it.
LARGEST = 2**31 - 1
MAX_WIDTH = 2**16
"""Largest width or depth of a network."""

# `--resume` without a value is True; "auto" resumes if there is something to resume, else starts.
Resume = bool | Literal["auto"]

_collected: contextvars.ContextVar[list[tuple[str, str]] | None] = contextvars.ContextVar("collected", default=None)


def refuse(name: str, problem: str) -> None:
    """Refuse the value of field `name` with the message "--NAME problem"; settings call this in `__post_init__`.

    Raises ConfigError; within `replace` the problem is collected instead, and `replace` raises all problems at once.
    """
    problems = _collected.get()
    if problems is None:
        raise ConfigError(f"--{flag(name)} {problem}")
    problems.append((name, problem))


def positive(config: object, *names: str, most: float = LARGEST) -> None:
    """Refuse every named field of `config` that is not a number, or a tuple of numbers, above zero and up to `most`."""
    for name in names:
        for value in _numbers(config, name, most):
            if not value > 0:
                refuse(name, f"must be above 0, not {value}.")


def not_negative(config: object, *names: str) -> None:
    """Refuse every named field of `config` that is, or contains, a number below zero, infinity or nan."""
    between(config, 0, math.inf, *names)


def between(config: object, low: float, high: float, *names: str) -> None:
    """Refuse every named field of `config` outside [low, high]; every number of a tuple must lie in this range.

    If `high` is infinity, infinity and numbers above `LARGEST` are refused too.
    """
    for name in names:
        for value in _numbers(config, name, high if low <= 0 and high > 1 else math.inf):
            if value < low and high > 1:  # the upper limit, often a very large number, does not matter to the user
                refuse(name, f"must be {low:.10g} or above, not {value}.")
            elif not low <= value <= high:
                refuse(name, f"must lie in [{low:.10g}, {high:.10g}], not {value}.")


def below_one(config: object, *names: str) -> None:
    """Refuse every named field of `config` outside [0, 1), such as the decay of a moving average; 1 keeps the start."""
    for name in names:
        for value in _numbers(config, name):
            if not 0 <= value < 1:
                refuse(name, f"must be at least 0 and below 1, not {value}.")


def different(config: object, *names: str) -> None:
    """Refuse every named field of `config` that contains an item twice."""
    for name in names:
        items = getattr(config, name)
        for item in dict.fromkeys(item for item in items if items.count(item) > 1):
            refuse(name, f"names {item} twice: give it once.")


def _numbers(config: object, name: str, most: float = math.inf) -> list[float]:
    """Return the number or numbers of a field; refuse those that are not finite, or above `most` or `LARGEST`."""
    value, most = getattr(config, name), min(most, LARGEST)
    numbers = []
    for number in value if isinstance(value, tuple) else (value,):
        if not math.isfinite(number):
            refuse(name, f"must be a finite number, not {number}.")
        elif number > most:
            refuse(name, f"must be at most {most:.10g}, not {number}.")
        else:
            numbers.append(number)
    return numbers


def narrow(config: Any) -> None:
    """Convert each group of `config` to the declared type of its field, in case Python code passed a subclass.

    Refuses a non-default value in a field that only the subclass has, since the command would not read it.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        kind, group = hints[field.name], getattr(config, field.name)
        if not dataclasses.is_dataclass(kind) or type(group) is kind:
            continue
        names = {inner.name for inner in dataclasses.fields(kind)}
        for inner in dataclasses.fields(group):
            if inner.name not in names and getattr(group, inner.name) != inner.default:
                refuse(f"{field.name}.{inner.name}", "is not a setting of this command, which would not read it.")
        values = {name: getattr(group, name) for name in names}
        object.__setattr__(config, field.name, typing.cast("type[Any]", kind)(**values))


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def settings_class(config_type: type[C]) -> type[C]:
    """Make a settings class: a frozen keyword-only dataclass whose fields with fixed choices accept no other value.

    Any other value raises ConfigError, also if Python code builds the settings.
    """
    made = dataclasses.dataclass(frozen=True, kw_only=True)(config_type)
    build = made.__init__

    @functools.wraps(build)
    def checked(self: C, **values: Any) -> None:
        choices = _choices(made) if values else {}  # type: ignore[arg-type]  # mypy takes no type as hashable
        build(self, **{name: coerce(v, choices[name], name) if name in choices else v for name, v in values.items()})

    made.__init__ = checked  # type: ignore[assignment]
    return made


@functools.cache
def _choices(config_type: type[Any]) -> dict[str, Any]:
    """Return the fields that take one or several of a fixed set of words, with the types of their values."""
    kinds = typing.get_type_hints(config_type)
    return {
        name: kind
        for name, kind in kinds.items()
        if any(get_origin(part) is Literal for part in (kind, *get_args(kind)))
    }


def flag(name: str) -> str:
    """Return a field's name on the command line, without leading dashes."""
    return name.replace("_", "-")


def is_switch(kind: Any) -> bool:
    """Return whether a flag whose value has this type may be given without a value."""
    return kind is bool or kind == Resume


def field_name(flag_name: str) -> str:
    """Return the field name of a flag, which is given without leading dashes; dots stay."""
    return flag_name.replace("-", "_")


def flags(config_type: type[Any], prefix: str = "") -> dict[str, Any]:
    """Return every flag of a settings class with the type of its value; nested flags have dots (`optim.lr`)."""
    return dict(_flags(config_type, prefix))  # type: ignore[arg-type]  # mypy takes no type as hashable


@functools.cache
def _flags(config_type: type[Any], prefix: str) -> dict[str, Any]:
    types_by_flag: dict[str, Any] = {}
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        kind = hints[field.name]
        name = prefix + flag(field.name)
        if dataclasses.is_dataclass(kind):
            types_by_flag |= flags(typing.cast("type[Any]", kind), name + ".")
        else:
            types_by_flag[name] = kind
    return types_by_flag


def flag_words(config: Any, default: Any, *, always: Sequence[str] = (), never: Sequence[str] = ()) -> list[str]:
    """Return the flags that turn `default` into `config`; `shlex.join` turns them into a shell command line.

    Args:
        config: settings.
        default: settings of the same type.
        always: names of flags that are written even if their value is the default's.
        never: names of flags that are left out.
    """
    words: list[str] = []
    for name in flags(type(config)):
        read = attrgetter(field_name(name))
        value = read(config)
        if name in never or (value == read(default) and name not in always):
            continue
        if isinstance(value, bool):
            group, dot, leaf = name.rpartition(".")
            words.append(f"--{name}" if value else f"--{group}{dot}no-{leaf}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def to_dict(config: Any) -> dict[str, Any]:
    """Return the settings as a nested dictionary of plain values (tuples become lists)."""
    return typing.cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(config))))


def replace(config: C, changes: dict[str, Any]) -> C:
    """Return a copy of `config` with `changes`, given as nested dictionaries or by dotted names.

    If `config` has a method `implied`, the settings implied by `changes` change too, unless `changes` contains them.
    Raises ConfigError for unknown names and for values of the wrong type or out of range, with one line per problem.
    """
    problems: list[str] = []
    implied = getattr(config, "implied", None)
    changed = _replace(config, {**(implied(changes) if implied else {}), **changes}, "", problems)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return changed


def _replace(config: C, changes: dict[str, Any], prefix: str, problems: list[str]) -> C:
    """Return the copy, or `config` itself after adding to `problems`; `prefix` is the dotted name of the group."""
    hints = typing.get_type_hints(type(config))
    field_names = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    before = len(problems)
    for name, value in _nested(changes).items():
        full = prefix + name
        if name not in field_names:
            problems.append(f"Unknown setting '{full}'.{did_you_mean(name, field_names)}")
        elif dataclasses.is_dataclass(hints[name]):
            if isinstance(value, dict):
                values[name] = _replace(getattr(config, name), value, full + ".", problems)
            else:
                problems.append(f"--{flag(full)} is a group of settings, not '{value}': set the settings in the group.")
        else:
            try:
                values[name] = coerce(value, hints[name], full)
            except ConfigError as error:
                problems.append(str(error))
    return _construct(config, values, prefix, problems, has_problems=len(problems) > before) or config


def _nested(changes: dict[str, Any]) -> dict[str, Any]:
    """Return the changes with a dictionary for each group instead of dotted names."""
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if rest:
            value = {rest: value}
        if isinstance(value, dict) and isinstance(nested.get(head), dict):
            value = {**nested[head], **value}
        nested[head] = value
    return nested


def _construct(config: C, values: dict[str, Any], prefix: str, problems: list[str], *, has_problems: bool) -> C | None:
    """Return `config` with `values`, or None after adding the problems that its `__post_init__` reports.

    If this group already has problems, a conflict between settings is not reported, because it may follow from them.
    """
    refused: list[tuple[str, str]] = []
    token = _collected.set(refused)
    try:
        changed: C = dataclasses.replace(config, **values)  # type: ignore[type-var]
    except ConfigError as error:
        if not (refused or has_problems):
            problems.append(str(error))
    except Exception:
        if not (refused or has_problems):
            raise  # otherwise the error follows from values already refused
    else:
        if not refused:
            return changed
    finally:
        _collected.reset(token)
        problems += [f"--{flag(prefix + name)} {problem}" for name, problem in refused]
    return None


def coerce(value: Any, kind: Any, name: str) -> Any:
    """Convert a plain value (from JSON, Python or the text of a flag) to a field's type `kind`.

    Raises a ConfigError that names the flag, the value and the values that the flag takes.
    """
    origin = get_origin(kind)
    if origin is Literal:
        if value in get_args(kind):
            return value
        options = [str(option) for option in get_args(kind)]
        raise ConfigError(
            f"--{flag(name)} is one of {', '.join(options)}, not '{value}'.{did_you_mean(str(value), options)}"
        )
    if kind == Resume:
        if value == "auto" or isinstance(value, bool) or str(value).lower() in ("true", "false"):
            return value if value == "auto" else _coerce_scalar(value, bool, name)
        raise ConfigError(f"--{flag(name)} takes true or false, or auto, not '{value}'.")
    if origin is tuple:
        items = list(value) if isinstance(value, list | tuple) else [value]
        item_types = get_args(kind)
        if item_types[-1] is not Ellipsis and len(items) != len(item_types):
            raise ConfigError(f"--{flag(name)} takes {len(item_types)} values, not {len(items)}.")
        return tuple(coerce(item, item_types[0], name) for item in items)
    if origin in (typing.Union, types.UnionType):  # the first type that takes the value, or the error of the last type
        *first_types, last_type = [option for option in get_args(kind) if option is not type(None)]
        for option in first_types:
            with contextlib.suppress(ConfigError):
                return coerce(value, option, name)
        return None if value is None and type(None) in get_args(kind) else coerce(value, last_type, name)
    return _coerce_scalar(value, kind, name)


def _coerce_scalar(value: Any, kind: Any, name: str) -> Any:
    descriptions = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    try:
        if kind is bool and isinstance(value, bool):
            return value
        if kind is bool and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        if kind is int and not isinstance(value, bool) and (isinstance(value, str) or int(value) == value):
            return int(value)
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is str and isinstance(value, str | int | float | Path) and not isinstance(value, bool):
            if "\0" in str(value):
                raise ConfigError(f"--{flag(name)} takes a text without NUL characters, not '{value}'.")
            return str(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"--{flag(name)} takes {descriptions.get(kind, str(kind))}, not '{value}'.")


def load(default: C, path: str | Path, command: str = "") -> C:
    """Return `default` with the values of a configuration file: config.json of a run, YAML or TOML.

    Args:
        default: settings that provide the values missing from the file.
        path: the file, or a folder with a config.json.
        command: the command that the file must belong to; if empty, a file of any command is accepted.

    Raises:
        ConfigError: the file is missing or invalid, or belongs to another command.
    """
    values = read_config(path)
    values.pop("recipe", "")  # `default` already has its values
    if transform := values.pop("python", {}).get("transform"):
        raise ConfigError(
            f"'{path}': the run took the transform {transform} from Python, which no file holds: call the function of "
            "pecobook with transform=... again."
        )
    written_by = values.pop("command", command)
    if command and written_by != command:
        raise ConfigError(f"--config '{path}' is a configuration of '{written_by}', not of '{command}'.")
    with errors_with_lines(path):
        return replace(default, values)
