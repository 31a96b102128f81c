"""Objects that Python code passes to a run instead of names: data sets, networks, a transform, a hook.

The settings contain the name `python:CLASS` instead of such an object, and config.json therefore shows what it was. No
file contains the object itself: a run can resume if the same Python code passes it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from pecobook.errors import ConfigError

PREFIX = "python:"
_objects: dict[str, Any] = {}


def name_of(value: Any) -> str:
    """Return an object's entry in config.json: `python:` and its class, a function's name, or the number of files."""
    if isinstance(value, list | tuple):
        return f"{PREFIX}list of {len(value)} files"
    if isinstance(value, Mapping):
        return f"{PREFIX}{', '.join(f'{split} {name_of(part).removeprefix(PREFIX)}' for split, part in value.items())}"
    return PREFIX + str(getattr(value, "__qualname__", type(value).__qualname__))


@contextlib.contextmanager
def giving(objects: Mapping[str, Any]) -> Iterator[None]:
    """Within the context the objects stand for their names; keys are settings, `transform` and `on_step`."""
    before = dict(_objects)
    _objects.update(objects)
    try:
        yield
    finally:
        _objects.clear()
        _objects.update(before)


def given(setting: str, name: str) -> Any:
    """Return the object that stands for the value `name` of a setting; None for the name of anything else.

    Raises:
        ConfigError: the name is that of an object, but no code passed the object.
    """
    if not name.startswith(PREFIX):
        return None
    if name_of(_objects.get(setting)) != name:
        keyword = setting.partition(".")[0]
        raise ConfigError(
            f"--{setting} '{name}' is an object of Python, which no file holds: call the function of pecobook with "
            f"{keyword}=... (to go on with a run, also with resume=True)."
        )
    return _objects[setting]


def hook(kind: str) -> Any:
    """Return the `transform` or `on_step` that code passed; None if there is none."""
    return _objects.get(kind)


def hooks() -> dict[str, str]:
    """Return the names of the transform and the hook, for config.json, which has no setting for them."""
    return {kind: name_of(_objects[kind]) for kind in ("transform", "on_step") if kind in _objects}
