"""`pecobook COMMAND --help` on one screen, from the settings' docstrings; `--help-all` shows every flag."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from operator import attrgetter
from typing import Any, Literal

from pecobook.commands.table import COMMANDS
from pecobook.recipes import DEFAULT_RECIPE, RECIPES, claim
from pecobook.settings.values import field_name, flag, flags, is_switch

_WIDTH = 100
_CONFIG = "Read settings from the config.json of a run; flags change single ones."


def page(command: str, config: Any, recipe: str = "") -> str:
    """Return the short help of a command, at most 40 lines of 100 columns.

    Args:
        command: name of the command, a key of `COMMANDS`.
        config: settings whose values are shown as defaults.
        recipe: name of the recipe of these settings, if any.
    """
    content, lines = COMMANDS[command], _usage(command, config)
    if command in RECIPES:
        lines += ["", f"recipes (without one: {DEFAULT_RECIPE}; more: pecobook recipes {command} NAME)"]
        lines += [_cut(f"  {name:<16} {claim(command, name)}") for name in RECIPES[command]]
    lines += ["", "examples", *(f"  pecobook {example}" for example in content.examples), ""]
    lines.append(f"flags (defaults of recipe {recipe})" if recipe else "flags")
    types, texts = flags(type(config)), explanations(type(config))
    for name in content.flags.split():
        ending = default_of(attrgetter(field_name(name))(config), types[name])
        lines.append(_cut(f"  --{name:<24} {first_sentence(texts[name])}", ending))
    lines.append(f"  --config FILE              {_CONFIG}")
    return "\n".join([*lines, "", f"--help-all explains all {len(types) + 1} flags."])


def every_flag(command: str, config: Any, recipe: str = "") -> str:
    """Return the long help of a command: all flags by group, with explanation and default. Arguments as for `page`."""
    lines = [*_usage(command, config), "", f"defaults of recipe {recipe}" if recipe else "defaults in brackets"]
    texts, group = explanations(type(config)), ""
    for name, kind in sorted(flags(type(config)).items(), key=lambda pair: pair[0].count(".")):
        head, _, leaf = name.rpartition(".")
        if head != group:
            group = head
            lines += ["", _wrapped(f"{group}: {inspect.getdoc(type(attrgetter(field_name(group))(config)))}", "")]
        off = f", --{head}{'.' if head else ''}no-{leaf}" if is_switch(kind) else ""
        default = default_of(attrgetter(field_name(name))(config), kind)
        lines += ["", f"  --{name}{off}", _wrapped(texts[name] + default, "      ")]
    return "\n".join([*lines, "", "  --config FILE", _wrapped(_CONFIG, "      ")])


def _usage(command: str, config: Any) -> list[str]:
    """Return the lines with a command's usage and its settings' docstring."""
    usage = f"usage: pecobook {command} {COMMANDS[command].usage} [--flag\N{NO-BREAK SPACE}value\N{NO-BREAK SPACE}...]"
    return [
        _wrapped(usage, "    ", first="").replace("\N{NO-BREAK SPACE}", " "),
        "",
        inspect.getdoc(type(config)) or "",
    ]


def _wrapped(text: str, indent: str, first: str | None = None) -> str:
    start = indent if first is None else first
    return textwrap.fill(text, _WIDTH, initial_indent=start, subsequent_indent=indent, break_on_hyphens=False)


def default_of(value: Any, kind: Any) -> str:
    """Return the default and the other choices in brackets, or an empty string if the default is nothing."""
    if typing.get_origin(kind) is Literal:
        return f" ({value}; or {', '.join(str(choice) for choice in typing.get_args(kind) if choice != value)})"
    if value is False or value in ("", ()):
        return ""
    text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f" ({'on' if value is True else text})"


def _cut(text: str, ending: str = "") -> str:
    room = _WIDTH - len(ending)
    return (text if len(text) <= room else text[: room - 3].rpartition(" ")[0].rstrip(",:;") + " ...") + ending


def first_sentence(text: str) -> str:
    """Return the text up to the first full stop that is followed by a space."""
    head, dot, _ = text.partition(". ")
    return head + "." if dot else text


def explanations(config_type: type[Any], prefix: str = "") -> dict[str, str]:
    """Return the docstring under each field of a settings class, keyed by its flag; nested flags have dots."""
    texts: dict[str, str] = {}
    for base in reversed(config_type.__mro__[:-1]):
        texts |= {prefix + name: text for name, text in _explanations_in(base).items()}
    for name, kind in typing.get_type_hints(config_type).items():
        if dataclasses.is_dataclass(kind):
            texts |= explanations(typing.cast("type[Any]", kind), f"{prefix}{flag(name)}.")
    return texts


@functools.cache
def _explanations_in(kind: type[Any]) -> dict[str, str]:
    """Return the docstrings in the source of a class, without those of its base classes."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts: dict[str, str] = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            text = ast.literal_eval(after.value)  # type: ignore[attr-defined]
            texts[flag(field.target.id)] = " ".join(str(text).split())
    return texts
