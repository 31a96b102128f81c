"""The errors a user can meet. Each says what is wrong, names the value, and says what to do.

The command line prints them without a traceback and exits with code 2; in Python they are ordinary exceptions.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


class PecobookError(Exception):
    """A mistake that its user can mend. The message is one to three lines."""

    on_all_ranks = False
    """Whether every process of a run raises it, so that one of them tells it for all."""


class ConfigError(PecobookError):
    """A setting has a value that cannot work."""


class DataError(PecobookError):
    """A data source is missing, empty or unreadable."""


class WeightsError(PecobookError):
    """Weights are missing or do not fit the network they are meant for."""


class RunFolderError(PecobookError):
    """A run folder cannot be written, resumed or read."""


class NonFiniteLossError(PecobookError):
    """The loss or its gradient became infinite or not a number."""

    on_all_ranks = True


class PreflightError(PecobookError):
    """Several problems found before a run started, one line each."""

    def __init__(self, problems: Iterable[PecobookError]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class Preflight:
    """The checks before a run: all are made, and `finish` raises what they found at once."""

    def __init__(self) -> None:
        self.problems: list[PecobookError] = []

    def check(self, function: Callable[[], T]) -> T | None:
        """What `function` returns; None where it raises PecobookError, which is kept."""
        try:
            return function()
        except PreflightError as error:
            self.problems += error.problems
        except PecobookError as error:
            self.problems.append(error)
        return None

    def finish(self) -> None:
        """Raise PreflightError when anything was found, each problem once."""
        if self.problems:
            raise PreflightError({str(problem): problem for problem in self.problems}.values())


def did_you_mean(value: str, options: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the option nearest to `value`, or an empty string when none is near."""
    near = difflib.get_close_matches(value, list(options), n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""


def first_line(error: BaseException) -> str:
    """What another library says went wrong, in one line; its kind when it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def listed(lines: Sequence[str], most: int = 10) -> str:
    """The first lines, and how many more there are."""
    more = [f"... and {len(lines) - most:,} more"] if len(lines) > most else []
    return "\n".join([*lines[:most], *more])
