"""SIGINT, SIGTERM and SIGUSR1 during a run: it stops once the step is done and saved.

SIGUSR1 is the usual warning of Slurm before a time limit (`--signal=USR1@120`).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from pecobook.engine.siblings import watched
from pecobook.engine.world import launched

_STOP = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Signals:
    """Record the signals that ask a run to stop in `received`, so that the loop stops after the step.

    A further SIGINT stops at once. A further SIGTERM or SIGUSR1 does not: launchers repeat them, as torchrun repeats a
    signal that Slurm has sent to every process already, and the checkpoint would be lost.

    Contexts nest: an inner one returns the outer one, whose handlers stay.

    Args:
        until_exit: whether the process ends after the context, and ignores SIGTERM and SIGUSR1 until it has.
    """

    _outer: ClassVar[Signals | None] = None

    def __init__(self, *, until_exit: bool = False) -> None:
        self.received = False
        self._until_exit = until_exit
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if Signals._outer is not None:
            return Signals._outer
        if threading.current_thread() is threading.main_thread():
            Signals._outer = self
            for number in _STOP:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            Signals._outer = None
        for number, handler in self._before.items():
            # Python resets handlers of its own before it ends, but not that a signal is ignored.
            leaves = self._until_exit and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if leaves else handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True


def stop_requested() -> bool:
    """Return whether a signal has asked this process to stop, since the outermost context was entered."""
    return Signals._outer is not None and Signals._outer.received


@contextmanager
def from_the_start(*, several: bool = False, until_exit: bool = False) -> Iterator[None]:
    """In this context signals are recorded in a process that torchrun or srun has started, or that is to start others.

    It is entered before anything large is imported, because a process that ended while it starts would leave the others
    waiting for it. A process that is alone has nothing to save yet and ends at once.

    Args:
        several: whether the run has several processes although no launcher has started them.
        until_exit: as of `Signals`: srun sends SIGTERM to a process that is about to end when another has ended with a
            code other than 0. The process then also watches the others of its machine (`engine.siblings`).
    """
    world = launched()
    if several or (world is not None and world.size > 1):
        with Signals(until_exit=until_exit), watched(world if until_exit else None):
            yield
    else:
        yield
