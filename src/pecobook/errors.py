"""pecobook's errors. Each message states the problem, the wrong value and the remedy.

The command line prints these errors without a traceback and exits with code 2; in Python they are ordinary exceptions.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")
_QUERY = re.compile(r"https?://.*?\.(tar|parquet)\?")


class PecobookError(Exception):
    """A user error. The message has one to three lines."""

    on_all_ranks = False
    """Whether every process of a run raises the error, so that one process prints it for all."""
    exit_code = 2
    """Exit code of the command line: 2 if the command must be corrected, 1 if it can be retried as it is."""


class ConfigError(PecobookError):
    """A setting has an invalid value."""


class DataError(PecobookError):
    """A data source is missing, empty or unreadable."""


class WeightsError(PecobookError):
    """Weights are missing or do not fit their network."""


class RunFolderError(PecobookError):
    """A run folder cannot be written, resumed or read."""


class NonFiniteLossError(PecobookError):
    """The loss or its gradient became infinite or not a number."""

    on_all_ranks = True


class PreflightError(PecobookError):
    """Several problems found before a run started, one per line."""

    def __init__(self, problems: Iterable[PecobookError]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class Preflight:
    """The checks before a run: `check` collects all errors, and `finish` raises them together."""

    def __init__(self) -> None:
        self.problems: list[PecobookError] = []

    def check(self, function: Callable[[], T]) -> T | None:
        """Call `function` and return its value, or collect a PecobookError and return None."""
        try:
            return function()
        except PreflightError as error:
            self.problems += error.problems
        except PecobookError as error:
            self.problems.append(error)
        return None

    def finish(self) -> None:
        """Raise PreflightError with each problem once, if there are any."""
        if self.problems:
            raise PreflightError({str(problem): problem for problem in self.problems}.values())


def did_you_mean(value: str, options: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the option closest to `value`, or an empty string if none is close."""
    matches = difflib.get_close_matches(value, list(options), n=1, cutoff=0.65)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def shown(address: str) -> str:
    """Return the URL of a file on a web server without the part after `?`, such as a signature that expires."""
    return address.partition("?")[0] if _QUERY.match(address) else address


def loading_reason(error: BaseException) -> str:
    """Return why torch.load or np.load refused a file; their own messages recommend running the code in the file."""
    text = first_line(error)
    if "allow_pickle" in str(error):
        return "it holds no array of numbers"
    if "weights_only" in str(error):
        return "it holds more than tensors and plain values"
    if isinstance(error, (EOFError, LookupError)) or "PytorchStreamReader" in text:
        return "it is damaged, or of another kind"
    return text.rstrip(".")


def printable(text: str, *, keep: str = "") -> str:
    """Return text with its control characters escaped, since they could alter a terminal or forge a line of a log.

    `keep` lists control characters to keep, such as the line breaks of a multi-line message. File names may contain any
    character.
    """
    if text.isprintable():
        return text
    control = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(
        char if char in keep or unicodedata.category(char) not in control else char.encode("unicode_escape").decode()
        for char in text
    )


def some_of(names: Iterable[object], most: int = 10) -> str:
    """Return the first names, separated by commas, and "..." if there are more."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:most]) + (", ..." if len(texts) > most else "")


def counted(number: int, unit: str) -> str:
    """Return a number with its unit, given in the plural: "1 image", "1,000 images"."""
    return f"{number:,} {unit if number != 1 else unit.removesuffix('s')}"


def grouped(problems: Iterable[tuple[str, str]], more: str) -> tuple[str, ...]:
    """Return the first text of each kind of problem, with the number of further ones.

    Args:
        problems: kind and text of each problem.
        more: words after that number, such as "more alike".
    """
    texts: dict[str, list[str]] = {}
    for kind, text in problems:
        texts.setdefault(kind, []).append(text)
    return tuple(f"{alike[0]} ({len(alike) - 1:,} {more})" if len(alike) > 1 else alike[0] for alike in texts.values())


def listed(lines: Sequence[str], most: int | None = 10, *, further: int = 0) -> str:
    """Return the first lines as one text, with the number of the rest at the end.

    Args:
        lines: the lines.
        most: maximum number of lines; None returns all.
        further: number of lines that were already left out.
    """
    further += len(lines) - len(lines[:most])
    return "\n".join([*lines[:most], *([f"... and {further:,} more"] if further else [])])
