"""Child processes that end with their parent: a command that starts pecobook as a process never leaves it behind."""

from __future__ import annotations

import os
import signal
import threading
import time

_PARENT = "PECOBOOK_PARENT"
_PERIOD = 1.0
"""Seconds between two checks of the parent; polling works on every system, unlike a signal from the kernel."""


def child_environment() -> dict[str, str]:
    """Return the environment variables that make a child end when this process does, however it ends."""
    return {_PARENT: str(os.getpid())}


def end_with_parent() -> None:
    """Watch the process that started this one, if that process asked for it.

    When it has ended, this process gets SIGTERM, after which a training run saves its step. A rank that the first rank
    has started is killed, since it might wait for the first one forever.
    """
    text = os.environ.get(_PARENT, "")
    parent = int(text) if text.isdecimal() else 0
    if not parent or (os.getppid() != parent and _is_alive(parent)):  # inherited through another process
        return
    is_rank = "LOCAL_WORLD_SIZE" not in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PERIOD)
        os.kill(os.getpid(), signal.SIGKILL if is_rank else signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
