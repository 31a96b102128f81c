"""`pecobook COMMAND --help` on one screen, from the settings' own explanations; `--help-all` shows every flag."""

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
from pecobook.settings.values import flags

_WIDTH = 100


def page(command: str, config: Any, recipe: str = "") -> str:
    """The short help of a command, at most 40 lines of 100 columns.

    Args:
        command: its name, a key of `COMMANDS`.
        config: settings whose values are shown as defaults.
        recipe: the name of the recipe that they are, where there is one.
    """
    shown = COMMANDS[command]
    usage = f"usage: pecobook {command} {shown.usage} [--flag\N{NO-BREAK SPACE}value\N{NO-BREAK SPACE}...]"
    usage = "\n".join(textwrap.wrap(usage, _WIDTH, subsequent_indent="    ")).replace("\N{NO-BREAK SPACE}", " ")
    lines = [usage, "", inspect.getdoc(type(config)) or ""]
    if command in RECIPES:
        lines += ["", f"recipes (without one: {DEFAULT_RECIPE}; more: pecobook recipes {command} NAME)"]
        lines += [_cut(f"  {name:<16} {claim(command, name)}") for name in RECIPES[command]]
    lines += ["", "examples", *(f"  pecobook {example}" for example in shown.examples), ""]
    lines.append(f"flags (defaults of recipe {recipe})" if recipe else "flags")
    known, explained = flags(type(config)), explanations(type(config))
    for name in shown.flags.split():
        ending = _default(attrgetter(name.replace("-", "_"))(config), known[name])
        lines.append(_cut(f"  --{name:<24} {first_sentence(explained[name])}", ending))
    lines.append("  --config FILE              Read settings from the config.json of a run; flags change single ones.")
    return "\n".join([*lines, "", f"--help-all explains all {len(known) + 1} flags."])


def _default(value: Any, kind: Any) -> str:
    """A default and what else may be chosen, in brackets; empty where nothing is given."""
    if typing.get_origin(kind) is Literal:
        return f" ({value}; or {', '.join(str(other) for other in typing.get_args(kind) if other != value)})"
    if value is False or value in ("", ()):
        return ""
    words = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f" ({'on' if value is True else words})"


def _cut(text: str, ending: str = "") -> str:
    room = _WIDTH - len(ending)
    return (text if len(text) <= room else text[: room - 3].rpartition(" ")[0].rstrip(",:;") + " ...") + ending


def first_sentence(text: str) -> str:
    """The text up to its first full stop that a space follows."""
    head, dot, _ = text.partition(". ")
    return head + "." if dot else text


def explanations(config_type: type[Any], prefix: str = "") -> dict[str, str]:
    """What the text under each field of a settings class says, by the name of its flag, nested ones with dots."""
    found: dict[str, str] = {}
    for base in reversed(config_type.__mro__[:-1]):
        found |= {prefix + name: text for name, text in _of_one_class(base).items()}
    for name, kind in _groups(config_type).items():
        found |= explanations(kind, f"{prefix}{name}.")
    return found


@functools.cache
def _of_one_class(kind: type[Any]) -> dict[str, str]:
    """The explanations that stand in the source of a class, without those of its bases."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            text = ast.literal_eval(after.value)  # type: ignore[attr-defined]
            found[field.target.id.replace("_", "-")] = " ".join(str(text).split())
    return found


def _groups(config_type: type[Any]) -> dict[str, type[Any]]:
    hints = typing.get_type_hints(config_type)
    groups = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    return {name.replace("_", "-"): typing.cast("type[Any]", kind) for name, kind in groups.items()}
