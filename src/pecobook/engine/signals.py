"""SIGINT, SIGTERM, SIGHUP and SIGUSR1 during a run: it stops once the step is done and saved.

SIGUSR1 is Slurm's usual warning before a time limit (`--signal=USR1@120`). SIGHUP is sent when a terminal is closed or
its connection breaks; nohup ignores it, and then so does the run.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from pecobook.engine.siblings import watched
from pecobook.engine.world import launched

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
_STOP = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))


class Signals:
    """Record the signals that ask a run to stop in `received`, so that the loop stops after the step.

    A second SIGINT stops immediately. Other signals do not: launchers repeat them, as torchrun repeats a signal that
    Slurm has already sent to every process, and the checkpoint would be lost.

    Contexts nest: an inner one returns the outer one, whose handlers stay.

    Args:
        until_exit: whether the process ends after the context and then ignores all of them except SIGINT.
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
                if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            Signals._outer = None
        for number, handler in self._before.items():
            # Python resets its own handlers before it exits, but it does not reset ignored signals.
            leaves = self._until_exit and number != signal.SIGINT
            signal.signal(number, signal.SIG_IGN if leaves else handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True


def stop_requested() -> bool:
    """Return whether a signal has asked this process to stop since the outermost context was entered."""
    return Signals._outer is not None and Signals._outer.received


@contextmanager
def from_the_start(*, several: bool = False, until_exit: bool = False) -> Iterator[None]:
    """Record signals in this context, in a process that torchrun or srun has started, or that will start others.

    It is entered before any large import, because a process that ended during startup would leave the others waiting
    for it. A process on its own has nothing to save yet and ends immediately.

    Args:
        several: whether the run has several processes although no launcher has started them.
        until_exit: as in `Signals`: srun sends SIGTERM to a process that is about to end if another has ended with an
            exit code other than 0. The process then also watches the others on its machine (`engine.siblings`).
    """
    world = launched()
    if several or (world is not None and world.size > 1):
        # Read when torch is imported. Its warning of a lost connection is a stack trace of 25 lines; errors stay.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        with Signals(until_exit=until_exit), watched(world if until_exit else None):
            yield
    else:
        yield
