"""Faults inside a process: a kill before the n-th file event under a folder, a power cut, or errors from then on.

Python's audit hooks report every file that is opened, renamed or removed and every folder that is made, before it
happens; fsync is wrapped. The count is shared with the children of the process.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_LONGEST_CUT = 60.0
"""Seconds within which a power cut has killed its process."""


class Counter:
    """A number that a process and its forks count together."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    @property
    def value(self) -> int:
        return int(struct.unpack("q", self._memory[:8])[0])

    def add(self) -> int:
        """Add 1; return the new value."""
        value = self.value + 1
        self._memory[:8] = struct.pack("q", value)
        return value


class FileEvents:
    """Call `action(event, path)` before the file events under `folder`, from the n-th on, in this process.

    Args:
        folder: absolute path; events elsewhere do not count.
        counter: counts the events.
        at: number of the first event at which `action` is called; 0 counts only.
        action: what happens; an OSError that it raises is the outcome of the event.
    """

    def __init__(self, folder: Path, counter: Counter, at: int, action: Callable[[str, str], None]) -> None:
        self.folder, self.counter, self.at, self.action = str(folder), counter, at, action
        self.unsynced: dict[str, int] = {}
        self._inside = False
        # Half of the events are those of TensorBoard's thread, which opens its file for every record.
        self._one_at_a_time = threading.RLock()

    def install(self) -> None:
        """Begin to count; an audit hook stays until the process ends."""
        original = os.fsync

        def fsync(file: Any) -> None:
            number = file if isinstance(file, int) else file.fileno()
            path = str(Path(f"/proc/self/fd/{number}").readlink())
            with self._one_at_a_time:
                self._event("fsync", path)
                original(file)
                if path in self.unsynced:
                    self.unsynced[path] = os.fstat(number).st_size

        os.fsync = fsync  # type: ignore[assignment]
        lock = self._one_at_a_time
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes | os.PathLike) and isinstance(flags, int) and flags & _WRITES:
                self._event("open", os.fsdecode(path))
        elif event in _CHANGES:
            path = arguments[0]
            if isinstance(path, str | bytes | os.PathLike):
                self._event(event, os.fsdecode(path), arguments)

    def _event(self, event: str, path: str, arguments: tuple[Any, ...] = ()) -> None:
        if not path.startswith(self.folder):
            return
        with self._one_at_a_time:
            if self._inside:  # an event of the action
                return
            self._inside = True
            try:
                number = self.counter.add()
                if self.at and number >= self.at:
                    self.action(event, path)
                if event == "open":
                    self.unsynced.setdefault(path, 0)
                elif event == "os.rename" and path in self.unsynced:
                    self.unsynced[os.fsdecode(arguments[1])] = self.unsynced.pop(path)
            finally:
                self._inside = False

    # ----------------------------------------------------------------------------------------------------- actions

    def kill(self, _event: str, _path: str) -> None:
        """Kill this process."""
        os.kill(os.getpid(), signal.SIGKILL)

    def power_cut(self, _event: str, _path: str) -> None:
        """Lose a part of what was written and not flushed to the disk, then kill the process.

        A fork does that while all threads of the process are halted: what they write afterwards would otherwise follow
        text that was cut off.
        """
        process = os.getpid()
        if os.fork() == 0:
            os.kill(process, signal.SIGSTOP)
            while not all(_is_halted(task) for task in Path(f"/proc/{process}/task").iterdir()):
                time.sleep(0.001)
            chance = random.Random(self.at)
            for path, safe in self.unsynced.items():
                with contextlib.suppress(OSError):
                    size = Path(path).stat().st_size
                    os.truncate(path, chance.randint(min(safe, size), size))
            os.kill(process, signal.SIGKILL)
            os._exit(0)
        time.sleep(_LONGEST_CUT)
        raise RuntimeError("the power was not cut")


def _is_halted(task: Path) -> bool:
    return (task / "stat").read_text().rpartition(")")[2].split()[0] == "T"


def failing(number: int) -> Callable[[str, str], None]:
    """Return an action that fails as a full or broken disk: with the error `number`, for all that needs the disk."""

    def fail(event: str, path: str) -> None:
        if event not in ("os.remove", "os.rmdir"):  # these work on a full disk
            raise OSError(number, os.strerror(number), path)

    return fail


def removing(folder: Path) -> Callable[[str, str], None]:
    """Return an action that deletes the whole folder, once."""
    done: list[bool] = []

    def remove(_event: str, _path: str) -> None:
        if not done:
            done.append(True)
            shutil.rmtree(folder, ignore_errors=True)

    return remove


def at_event(folder: Path, at: int, action: str | Callable[[str, str], None], counter: Counter) -> Callable[[], None]:
    """Return a function for `Process(prepare=...)` that installs a fault; `action` may be the name of a method."""

    def prepare() -> None:
        events = FileEvents(folder, counter, at, lambda event, path: chosen(event, path))
        chosen: Callable[[str, str], None] = getattr(events, action) if isinstance(action, str) else action
        events.install()

    return prepare
