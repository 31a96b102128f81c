"""The one printer: all that pecobook tells its user goes through here, with control characters escaped.

Names of files and messages of libraries may hold characters that change a terminal or forge a line of a log.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from pecobook.errors import printable


class _Run:
    """Where the output of the present run goes."""

    quiet = False
    """Whether this process says nothing, since another process of the run does."""
    notes: list[str] | None = None
    """What was said before train.log was open; None outside a run."""
    log: Callable[[str], None] | None = None
    """Writes a line into train.log."""
    screen: Callable[[str], None] | None = None
    """Prints above a live bar; None without one."""


_run = _Run()


def show(text: str, *, stdout: bool = False, end: str = "\n", always: bool = False) -> None:
    """Print text to the screen: on standard error, or on standard output what other programs may read.

    Where standard error has gone, as with a closed terminal or the disk of its file full, the text is lost, and not the
    run. With `always` a process speaks that otherwise leaves it to another one.
    """
    text = printable(text, keep="\n\t")
    if _run.quiet and not always:
        return
    with contextlib.nullcontext() if stdout else contextlib.suppress(OSError):
        if _run.screen is not None and not stdout:
            _run.screen(text)
        else:
            print(text, end=end, file=sys.stdout if stdout else sys.stderr, flush=True)


def say(text: str) -> None:
    """Print a note on standard error and, in a run, write it into train.log, as soon as there is one."""
    if not text or _run.quiet:
        return
    show(text)
    if _run.log is not None:
        _run.log(text)
    elif _run.notes is not None:
        _run.notes.append(text)


@contextlib.contextmanager
def of_run(*, quiet: bool) -> Iterator[None]:
    """Within the context notes are kept for train.log; with `quiet` this process says nothing."""
    _run.quiet, _run.notes = quiet, []
    try:
        yield
    finally:
        _run.quiet, _run.notes, _run.log = False, None, None


def write_notes_to(log: Callable[[str], None] | None) -> None:
    """Write the notes of the run so far, and all later ones, by `log`; None ends that."""
    notes, _run.notes, _run.log = _run.notes or [], None, log
    if log is not None:
        for note in notes:
            log(note)


def print_above(screen: Callable[[str], None] | None) -> None:
    """Print by `screen`, above a live bar, until this is called with None."""
    _run.screen = screen
