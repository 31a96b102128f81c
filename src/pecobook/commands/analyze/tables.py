"""Tables of the report with one row per metric and one column per tokenizer.

A cell is a dash if its number is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pecobook.analysis.comparison import lookup
from pecobook.analysis.report import Table
from pecobook.analysis.wording import fixed
from pecobook.utils.json_files import is_number

Tokenizer = Mapping[str, Any]
"""The metrics of one tokenizer, as in `analysis.json`."""
Tokenizers = Sequence[Tokenizer]
Rows = list[tuple[str, Callable[[Tokenizer], str]]]
"""The rows of a table: a title, and a function that returns the cell of a tokenizer."""


def tokenizer_table(tokenizers: Tokenizers, rows: Rows, note: str = "") -> Table:
    """Make a table with one row per metric and one column per tokenizer."""
    header = ("", *(str(tokenizer["name"]) for tokenizer in tokenizers))
    return Table(header, tuple((title, *(cell(tokenizer) for tokenizer in tokenizers)) for title, cell in rows), note)


def number(*keys: str, digits: int, factor: float = 1) -> Callable[[Tokenizer], str]:
    """Return a function that formats the number under nested keys, multiplied by `factor`."""

    def cell(tokenizer: Tokenizer) -> str:
        value = lookup(tokenizer, *keys)
        return fixed(factor * value if is_number(value) else None, digits)

    return cell


def with_null(*keys: str, factor: float = 1) -> Callable[[Tokenizer], str]:
    """Return a function that formats a number with one decimal, and in brackets the number of permuted codes.

    The number of permuted codes has the key `null_KEY` beside the last key.
    """
    value, null = (number(*keys[:-1], key, digits=1, factor=factor) for key in (keys[-1], f"null_{keys[-1]}"))
    return lambda tokenizer: f"{value(tokenizer)} ({null(tokenizer)})"


def with_error(name: str) -> Callable[[Tokenizer], str]:
    """Return a function that formats the accuracy of a probe with its sampling error, if images suffice for one."""

    def cell(tokenizer: Tokenizer) -> str:
        value, error = tokenizer.get(name), tokenizer.get(f"{name}_error")
        if value is None:
            return "–"
        return "too few images" if error is None else f"{value:.1f} ± {error:.1f}"

    return cell


PROBE_ROWS: Rows = [
    ("linear probe of mean codewords, %", with_error("codeword_probe")),
    ("linear probe of bags of codes, %", with_error("bag_probe")),
]
