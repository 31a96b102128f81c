"""SIGINT and SIGTERM during training: the run stops once the step is done and saved."""

from __future__ import annotations

import signal
import threading
from typing import Any


class Signals:
    """Record SIGINT and SIGTERM in `received`, so that the loop stops after the step; a second signal stops at once."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, _number: int, _frame: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True
