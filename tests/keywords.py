"""Writes src/pecobook/keywords.py from the settings: `python -m tests.keywords`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pecobook
from pecobook.commands.table import COMMANDS
from pecobook.recipes import RECIPES
from pecobook.settings.training import TrainConfig
from pecobook.settings.values import Resume

FILE = Path(pecobook.__file__).parent / "keywords.py"
# Settings that also take objects; see docs/python.md.
_OBJECTS = ("data", "tokenizer", "backbone", "perceptual")
_HEADER = '''"""Typed keywords of the training functions, for editors; `python -m tests.keywords` writes this file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict

Text: TypeAlias = str | Path | float
"""A text, a path, or a number that stands for itself."""
'''


def name_of(config: type[Any]) -> str:
    """Return the name of the class of keywords of a class of settings."""
    return config.__name__.removesuffix("Config") + "Keywords"


def type_of(kind: Any) -> str:
    """Return the source of the type of a keyword."""
    if dataclasses.is_dataclass(kind):
        return name_of(typing.cast("type[Any]", kind))
    if kind == Resume:
        return 'bool | Literal["auto"]'
    if get_origin(kind) is Literal:
        return "Literal[" + ", ".join(json.dumps(option) for option in get_args(kind)) + "]"
    if get_origin(kind) is tuple:
        inner = list(dict.fromkeys(type_of(item) for item in get_args(kind) if item is not Ellipsis))
        return f"Sequence[{' | '.join(inner)}]"
    if get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(type_of(option) for option in get_args(kind)))
    return "Text" if kind is str else "None" if kind is type(None) else str(kind.__name__)


def classes() -> list[type[Any]]:
    """Return the classes of settings of all training commands, bases and groups before those that use them."""
    found: list[type[Any]] = []

    def add(config: type[Any]) -> None:
        hints = typing.get_type_hints(config)
        groups = [hints[field.name] for field in dataclasses.fields(config)]
        for needed in (*config.__bases__, *groups):
            if dataclasses.is_dataclass(needed):
                add(typing.cast("type[Any]", needed))
        if config not in found:
            found.append(config)

    for command in RECIPES:
        add(COMMANDS[command].settings)
    return found


def render() -> str:
    """Return the content of the file."""
    parts = [_HEADER]
    for config in classes():
        bases = [name_of(base) for base in config.__bases__ if dataclasses.is_dataclass(base)] or ["TypedDict"]
        hints = typing.get_type_hints(config)
        lines = [f"class {name_of(config)}({', '.join(bases)}, total=False):"]
        own = [name for name in inspect.get_annotations(config) if name in hints]
        inherited: dict[str, Any] = {}
        for base in filter(dataclasses.is_dataclass, config.__bases__):
            inherited |= typing.get_type_hints(base)
        for name in own:
            if name in inherited and type_of(inherited[name]) == type_of(hints[name]):
                continue
            is_any = name in _OBJECTS or (name == "network" and "Perceptual" in config.__name__)
            kind_text = "Any" if is_any else type_of(hints[name])
            note = "  # type: ignore[misc]" if name in inherited else ""
            lines.append(f"    {name}: {kind_text}{note}")
        if config is TrainConfig:
            lines += ["    transform: Callable[[Any], Any] | None", "    on_step: Callable[[Any], object] | None"]
        parts.append("\n".join(lines) + "\n")
    return "\n\n".join(parts)


if __name__ == "__main__":
    FILE.write_text(render())
