"""Numbers as a person reads them; a dash stands for what was not measured."""

from __future__ import annotations

import math
from typing import Any

from pecobook.analysis.probe import binomial_error


def duration(seconds: float) -> str:
    """Seconds as a person says them: `48 s`, `6 min 20 s`, `1 h 12 min`."""
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    if whole < 5400:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def is_number(value: object) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def fixed(value: Any, digits: int) -> str:
    """`value` with `digits` decimals."""
    return f"{value:.{digits}f}" if is_number(value) else "–"


def with_error(value: Any, number: int | None) -> str:
    """An accuracy in percent and its sampling error over `number` images, where that is known."""
    if not is_number(value):
        return "–"
    return f"{value:.1f} ± {binomial_error(value, number):.1f}" if number else f"{value:.1f}"


def out_of(value: Any, whole: Any) -> str:
    """`value` of `whole`, or alone where the whole is not known."""
    if not is_number(value):
        return "–"
    return f"{thousands(value)} of {thousands(whole)}" if is_number(whole) else thousands(value)


def thousands(value: float) -> str:
    """A count with thin spaces between its thousands."""
    return f"{value:,.0f}".replace(",", "\u202f")
