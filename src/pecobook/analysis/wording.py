"""Numbers and names as text for reports; a dash means that a value was not measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pecobook.analysis.probe import MIN_IMAGES, binomial_error
from pecobook.utils.json_files import is_number


def fixed(value: Any, digits: int) -> str:
    """Write `value` with `digits` decimals."""
    return f"{value:.{digits}f}" if is_number(value) else "–"


def accuracy_with_error(value: Any, number: int | None) -> str:
    """Write an accuracy in percent with the sampling error on `number` images, if the number is known.

    With fewer than `MIN_IMAGES` images the text is a count: `3 of 4`.
    """
    if not is_number(value):
        return "–"
    if number and number < MIN_IMAGES:
        return f"{round(value * number / 100)} of {number}"
    return f"{value:.1f} ± {binomial_error(value, number):.1f}" if number else f"{value:.1f}"


def out_of(value: Any, total: Any) -> str:
    """Write `value` of `total`, or only `value` if the total is unknown."""
    if not is_number(value):
        return "–"
    return f"{thousands(value)} of {thousands(total)}" if is_number(total) else thousands(value)


def thousands(value: float) -> str:
    """Write a count with thin spaces between the thousands."""
    return f"{value:,.0f}".replace(",", "\u202f")


def unique_names(sources: Sequence[str]) -> list[str]:
    """Return the last parts of paths, with as many parts as needed to be unique; equal paths are numbered."""
    parts = [[part for part in source.replace(":", "/").split("/") if part] or [source] for source in sources]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part)} ({number})" for number, part in enumerate(parts, start=1)]


def file_part(number: int, name: str) -> str:
    """Convert a name to a part of a file name with letters, digits, `-`, `.` and `_`, at most 64 characters.

    The number makes the part unique.
    """
    safe = re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)
    return f"{number}-{safe[-60:]}"
