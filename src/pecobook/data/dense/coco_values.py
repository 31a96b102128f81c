"""Values of a file in COCO's format: numbers, which some tools write as text, boxes, and the categories."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from pecobook.utils.numbers import is_number

_INTEGER = re.compile(r"\s*([+-]?\d{1,19})(\.0*)?\s*", re.ASCII)
_FLAGS = {"0": False, "1": True, "false": False, "true": True, "none": False, "": False}


class UnusableError(ValueError):
    """An image or an object that cannot be used, with the reason under which it is counted."""

    def __init__(self, text: str, reason: str = "objects that cannot be used") -> None:
        super().__init__(text)
        self.reason = reason


def as_integer(value: Any) -> int | None:
    """Return a JSON value as an integer that fits into 64 bits, also if it is written as 7.0 or "7"; else None."""
    if type(value) is int:
        return value if abs(value) < 2**63 else None
    if isinstance(value, str):
        match = _INTEGER.fullmatch(value)
        value = int(match[1]) if match else None
    if isinstance(value, float):
        value = int(value) if value.is_integer() else None
    return value if type(value) is int and abs(value) < 2**63 else None


def as_number(value: Any) -> float | None:
    """Return a JSON value as a finite number, also if it is written as a text; else None."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if is_number(value) else None


def as_flag(value: Any) -> bool:
    """Return a JSON value as a flag, also if it is written as "0" or "false". Raises UnusableError."""
    text = str(as_integer(value)) if as_integer(value) is not None else str(value).strip().lower()
    if text not in _FLAGS:
        raise UnusableError(f"has an 'iscrowd' that is neither 0 nor 1: {json.dumps(value)[:40]}")
    return _FLAGS[text]


def parse_box(box: Any, compute: Callable[[], Any] | None) -> tuple[float, float, float, float]:
    """Return x, y, width and height of a box.

    Args:
        box: the box in the file, or None.
        compute: computes a missing box from the mask; None if there is no mask.

    Raises:
        UnusableError: there are not four numbers.
    """
    values = compute() if box is None and compute else box
    numbers = [as_number(value) for value in values] if isinstance(values, list) else []
    if len(numbers) != 4 or None in numbers:
        raise UnusableError(f"has a 'bbox' that is not four numbers: {json.dumps(box)[:40]}")
    x, y, width, height = (math.nan if number is None else float(number) for number in numbers)
    return x, y, width, height


def format_size(size: Sequence[Any]) -> str:
    """Format height and width as "width x height"."""
    return f"{size[1]} x {size[0]}"


def read_categories(categories: list[Any], used: set[int]) -> tuple[dict[int, str], list[str]]:
    """Return id -> name of the categories in ascending order of the ids, and notes on entries that are odd or left out.

    An entry without an object is left out if it is only the group of other categories, as Roboflow writes it, or if its
    name stands there twice.

    Args:
        categories: the list of the file.
        used: ids of categories with an object.

    Raises:
        ValueError: a category is invalid, or two categories with objects have the same name.
    """
    parsed: list[tuple[int, str, Any]] = []
    for category in categories:
        number = as_integer(category.get("id")) if isinstance(category, dict) else None
        if number is None or category.get("name") is None:
            raise ValueError(f"category {json.dumps(category)[:60]} has no integer 'id' or no 'name'")
        parsed.append((number, str(category["name"]), category.get("supercategory")))
    groups = {str(group) for _, name, group in parsed if group != name}
    names: dict[int, str] = {}
    notes: list[str] = []
    # Categories with objects come first, so that an unused one with the same name is the one that is left out.
    for number, name, _ in sorted(parsed, key=lambda entry: (entry[0] not in used, entry[0])):
        if names.get(number) == name:
            continue
        is_group, is_taken = name in groups, name in names.values()
        if number not in used and (is_group or is_taken):
            why = "is the group of others" if is_group else "another one has its name"
            notes.append(f"category {number} '{name}' is left out: it has no object and {why}")
        elif number in names or is_taken:
            raise ValueError(f"category {number} ('{name}') has the id or the name of another category")
        else:
            names[number] = name
    if not names:
        raise ValueError("has no category")
    first_with: dict[str, str] = {}
    for name in names.values():
        other = first_with.setdefault(" ".join(name.lower().split()), name)
        if other != name:
            notes.append(f"the categories '{other}' and '{name}' differ only in case or spaces")
    return dict(sorted(names.items())), notes
