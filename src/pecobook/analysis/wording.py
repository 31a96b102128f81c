"""Numbers as text for reports; a dash means that a value was not measured."""

from __future__ import annotations

from typing import Any

from pecobook.analysis.probe import MIN_IMAGES, binomial_error
from pecobook.utils.json_files import is_number


def duration(seconds: float) -> str:
    """Write a time in seconds as text: `48 s`, `6 min 20 s`, `1 h 12 min`."""
    total = round(seconds)
    if total < 90:
        return f"{total} s"
    if total < 5400:
        return f"{total // 60} min {total % 60} s" if total % 60 else f"{total // 60} min"
    return f"{total // 3600} h {total % 3600 // 60} min"


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
