"""From flags, keywords and JSON to settings and back: checks, conversions, comparisons.

A recipe (`pecobook.recipes`) is a settings object with its values filled in; the command line and Python keywords
replace single values; `dump` writes what a run resolved to, and `load` reads it back. Nothing is ever built from a
string.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import json
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pecobook.errors import ConfigError, did_you_mean

C = TypeVar("C")
# Fields that change where or how fast a run goes, but not what it computes: a resumed run may change them.
FREE_ON_RESUME = frozenset(
    {
        *("out", "resume", "overwrite", "devices", "num_nodes", "strategy", "micro_batch_size", "workers"),
        *(
            "loggers",
            "log_every",
            "save_every",
            "save_minutes",
            "keep_checkpoints",
            "sample_every",
            "evaluation_images",
            "knn_images",
            "compile",
        ),
        *("test.mode", "test.stride", "test.scales", "test.flip"),  # not test.max_side, which training images follow
        "pyramid.checkpointing",
    }
)


# Settings that commands once had and did not read: files of earlier versions may hold them.
RETIRED = frozenset({"min_crop", "optim.layer_decay", "colour.blur", "colour.solarise"})

# Settings that are newer than some files, and what was computed before there was such a setting, where that is not the
# default.
BEFORE = {"group_size": 0}

_gathered: contextvars.ContextVar[list[tuple[str, str]] | None] = contextvars.ContextVar("gathered", default=None)


def refuse(name: str, told: str) -> None:
    """Refuse the value of field `name` of the settings that check themselves: "--NAME told".

    Raises ConfigError; while `replace` makes the settings, it is told by that, with all others and its full name.
    """
    found = _gathered.get()
    if found is None:
        raise ConfigError(f"--{flag(name)} {told}")
    found.append((name, told))


def positive(config: object, *names: str) -> None:
    """Refuse every named field of `config` that is not above zero."""
    for name in names:
        if not getattr(config, name) > 0:  # so that nan is refused too
            refuse(name, f"must be above 0, not {getattr(config, name)}.")


def between(config: object, low: float, high: float, *names: str) -> None:
    """Refuse every named field of `config` outside [low, high]."""
    for name in names:
        if not low <= getattr(config, name) <= high:
            refuse(name, f"must lie in [{low:g}, {high:g}], not {getattr(config, name)}.")


def narrow(config: Any) -> None:
    """Give each group of `config` the very type that its field declares, where Python code gave a wider one.

    Refuses a value other than its default of a setting that this command would not read.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        kind, given = hints[field.name], getattr(config, field.name)
        if not dataclasses.is_dataclass(kind) or type(given) is kind:
            continue
        own = {part.name for part in dataclasses.fields(kind)}
        for part in dataclasses.fields(given):
            if part.name not in own and getattr(given, part.name) != part.default:
                refuse(f"{field.name}.{part.name}", "is not a setting of this command, which would not read it.")
        values = {name: getattr(given, name) for name in own}
        object.__setattr__(config, field.name, typing.cast("type[Any]", kind)(**values))


def flag(name: str) -> str:
    """Name of a field on the command line."""
    return name.replace("_", "-")


def flags(config_type: type[Any], prefix: str = "") -> dict[str, Any]:
    """Every flag of a configuration and the type of its value, nested ones with dots (`optim.lr`)."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(config_type)
    for field in dataclasses.fields(config_type):
        kind = hints[field.name]
        name = prefix + flag(field.name)
        if dataclasses.is_dataclass(kind):
            found |= flags(typing.cast("type[Any]", kind), name + ".")
        else:
            found[name] = kind
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionary of plain values (tuples become lists)."""
    return typing.cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(config))))


def replace(config: C, changes: dict[str, Any]) -> C:
    """A copy of `config` with `changes`: nested dictionaries and dotted names both work.

    Raises ConfigError for unknown names and values of the wrong type or out of range: all of them, one line each.
    """
    told: list[str] = []
    changed = _replace(config, changes, "", told)
    if told:
        raise ConfigError("\n".join(dict.fromkeys(told)))
    return changed


def _replace(config: C, changes: dict[str, Any], prefix: str, told: list[str]) -> C:
    """The copy, or `config` itself where `told` got lines that say what is wrong; `prefix` leads to this group."""
    hints = typing.get_type_hints(type(config))
    known = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    before = len(told)
    for name, value in _nested(changes).items():
        full = prefix + name
        if name not in known:
            told.append(f"Unknown setting '{full}'.{did_you_mean(name, known)}")
        elif dataclasses.is_dataclass(hints[name]):
            if isinstance(value, dict):
                values[name] = _replace(getattr(config, name), value, full + ".", told)
            else:
                told.append(f"--{flag(full)} is a group of settings, not '{value}': set those in it.")
        else:
            try:
                values[name] = coerce(value, hints[name], full)
            except ConfigError as error:
                told.append(str(error))
    others = len(told) > before
    return _made(lambda: dataclasses.replace(config, **values), prefix, told, others=others) or config  # type: ignore[type-var]


def _nested(changes: dict[str, Any]) -> dict[str, Any]:
    """The same with a dictionary for each group, no dotted names."""
    nested: dict[str, Any] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if rest:
            value = {rest: value}
        if isinstance(value, dict) and isinstance(nested.get(head), dict):
            value = {**nested[head], **value}
        nested[head] = value
    return nested


def _made(make: Callable[[], C], prefix: str, told: list[str], *, others: bool) -> C | None:
    """The settings that `make` makes, or None with lines added to `told` that say what they refuse of themselves.

    With `others` wrong already, what does not go together is left to the next try: it may follow from those.
    """
    found: list[tuple[str, str]] = []
    token = _gathered.set(found)
    try:
        made = make()
    except ConfigError as error:
        if not (found or others):
            told.append(str(error))
    except Exception:
        if not (found or others):
            raise  # otherwise it followed from values already refused
    else:
        if not found:
            return made
    finally:
        _gathered.reset(token)
        told += [f"--{flag(prefix + name)} {text}" for name, text in found]
    return None


def coerce(value: Any, kind: Any, name: str) -> Any:
    """Check a plain value (from JSON, Python or a flag's text) against a field's type and convert it.

    Raises ConfigError that names the flag, the value and what it takes.
    """
    origin = get_origin(kind)
    if origin is Literal:
        if value in get_args(kind):
            return value
        options = [str(option) for option in get_args(kind)]
        raise ConfigError(
            f"--{flag(name)} is one of {', '.join(options)}, not '{value}'.{did_you_mean(str(value), options)}"
        )
    if origin is tuple:
        items = list(value) if isinstance(value, list | tuple) else [value]
        inner = get_args(kind)
        if inner[-1] is not Ellipsis and len(items) != len(inner):
            raise ConfigError(f"--{flag(name)} takes {len(inner)} values, not {len(items)}.")
        return tuple(coerce(item, inner[0], name) for item in items)
    if origin in (typing.Union, types.UnionType):  # the first kind that takes the value; the last one's error
        *others, last = [a for a in get_args(kind) if a is not type(None)]
        for other in others:
            with contextlib.suppress(ConfigError):
                return coerce(value, other, name)
        return None if value is None and type(None) in get_args(kind) else coerce(value, last, name)
    return _coerce_scalar(value, kind, name)


def _coerce_scalar(value: Any, kind: Any, name: str) -> Any:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    try:
        if kind is bool and isinstance(value, bool):
            return value
        if kind is bool and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        if kind is int and not isinstance(value, bool) and int(value) == float(value):
            return int(value)
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is str and isinstance(value, str | int | float | Path) and not isinstance(value, bool):
            return str(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ConfigError(f"--{flag(name)} takes {words.get(kind, str(kind))}, not '{value}'.")


def dump(config: Any, path: Path) -> None:
    """Write `config` as JSON that `load` and `--config` read."""
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load(default: C, path: str | Path) -> C:
    """Read a config.json over `default`. Raises ConfigError when it is missing, broken or of another command."""
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"There is no configuration file '{file}'.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"'{file}' cannot be read as a configuration: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"'{file}' is not a configuration: it must hold a JSON object.")
    values.pop("command", None)
    return replace(default, _without_retired(values, default))


def _without_retired(values: dict[str, Any], default: Any, prefix: str = "") -> dict[str, Any]:
    """The same without settings that `default`'s command has no more."""
    known = {field.name for field in dataclasses.fields(default)}
    kept = {name: value for name, value in values.items() if name in known or prefix + name not in RETIRED}
    for name, value in kept.items():
        if isinstance(value, dict) and dataclasses.is_dataclass(getattr(default, name, None)):
            kept[name] = _without_retired(value, getattr(default, name), f"{prefix}{name}.")
    return kept


def complete(old: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Settings that an earlier version wrote, with the defaults of those that it did not know."""
    found = defaults | {name: BEFORE[name] for name in BEFORE.keys() & defaults.keys()} | old
    for name, value in defaults.items():
        if isinstance(value, dict) and isinstance(old.get(name), dict):
            found[name] = complete(old[name], value)
    return found


def changed_settings(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Lines such as `optim.lr: 0.001 -> 0.01` for every setting that a resumed run may not change."""
    lines: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        before, after, full = old.get(name), new.get(name), prefix + name
        if full in RETIRED and name not in new:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            lines += changed_settings(before, after, f"{full}.")
        elif before != after and full not in FREE_ON_RESUME:
            lines.append(f"{flag(full)}: {before} -> {after}")
    return lines
