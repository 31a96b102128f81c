"""The only printer: everything that pecobook tells its user goes through here, with control characters escaped.

File names and library messages may contain characters that alter a terminal or forge a line of a log.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import parent_process

from pecobook.errors import printable


class _Run:
    """Where the output of the current run goes."""

    quiet = False
    """Whether this process prints nothing, since another process of the run does."""
    notes: list[str] | None = None
    """Notes from before train.log was open; None outside a run."""
    log: Callable[[str], None] | None = None
    """Writes a line to train.log."""
    screen: Callable[[str], None] | None = None
    """Prints above a live bar; None without one."""
    waiting: threading.Event | None = None
    """Ends the live line of `doing`; None without one."""


_run = _Run()
_said: set[str] = set()
"""The matters that `say_once` has mentioned in this process."""
_lock = threading.RLock()
"""Held while the live line of `doing` is drawn or erased."""


def show(text: str, *, stdout: bool = False, end: str = "\n", always: bool = False) -> None:
    """Print text to the screen: on standard error or, if other programs may read it, on standard output.

    If standard error is gone, as with a closed terminal or a full disk, the text is lost, but not the run. With
    `always`, a process prints even if it would otherwise leave that to another one.
    """
    text = printable(text, keep="\n\t")
    if _run.quiet and not always:
        return
    doing("")
    with contextlib.nullcontext() if stdout else contextlib.suppress(OSError):
        if _run.screen is not None and not stdout:
            _run.screen(text)
        else:
            print(text, end=end, file=sys.stdout if stdout else sys.stderr, flush=True)


def doing(text: str, *, after: float = 5) -> None:
    """Say what the command is doing until it shows something else; an empty text ends that.

    A terminal gets a live line at once, with the elapsed seconds. A log gets a plain line if the command is still busy
    after `after` seconds.
    """
    with _lock:
        if _run.waiting is not None:
            _run.waiting.set()
            _run.waiting = None
            if _is_terminal():
                _draw("")
        if not text or _run.quiet or _run.screen is not None:
            return
        _run.waiting = over = threading.Event()
    if _is_terminal():
        _draw(text)
        threading.Thread(target=_count_seconds, args=(text, over), daemon=True).start()
    elif after == 0:
        show(f"{text[0].upper()}{text[1:]}.")
    else:
        threading.Thread(target=_say_late, args=(text, over, after), daemon=True).start()


def _count_seconds(text: str, over: threading.Event) -> None:
    began = time.monotonic()
    while not over.wait(1):
        with _lock:
            if not over.is_set():
                _draw(f"{text}, {time.monotonic() - began:.0f} s")


def _say_late(text: str, over: threading.Event, after: float) -> None:
    if not over.wait(after):
        with _lock:
            if not over.is_set():
                show(f"{text[0].upper()}{text[1:]}.")


def _draw(text: str) -> None:
    """Replace the cursor's line, which was empty or a live line."""
    with contextlib.suppress(OSError):
        print(f"\r\x1b[2K{printable(text)}", end="", file=sys.stderr, flush=True)


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def say(text: str) -> None:
    """Print a note on standard error and, in a run, write it to train.log as soon as there is one."""
    if not text or _run.quiet:
        return
    show(text)
    if _run.log is not None:
        _run.log(text)
    elif _run.notes is not None:
        _run.notes.append(text)


def say_once(about: str, text: str) -> None:
    """Say a text as `say` does, but only the first time for a given matter; worker processes say nothing."""
    if about not in _said and parent_process() is None:
        say(text)
    _said.add(about)


@contextlib.contextmanager
def of_run(*, quiet: bool) -> Iterator[None]:
    """Within the context notes are kept for train.log; with `quiet` this process prints nothing."""
    _run.quiet, _run.notes, _run.log = quiet, [], None
    try:
        yield
    finally:
        _run.quiet, _run.notes, _run.log = False, None, None


def write_notes_to(log: Callable[[str], None] | None) -> None:
    """Write the run's notes so far, and all later ones, with `log`; None ends that."""
    notes, _run.notes, _run.log = _run.notes or [], None, log
    if log is not None:
        for note in notes:
            log(note)


def print_above(screen: Callable[[str], None] | None) -> None:
    """Print with `screen`, above a live bar, until this is called with None."""
    _run.screen = screen
