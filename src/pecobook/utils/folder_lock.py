"""A lock on a folder: only one process at a time writes to the folder, or one for each part of it."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import filelock

from pecobook.errors import RunFolderError, first_line

LOCK_FILES = frozenset({".lock", ".soft-lock"})
"""Files in a folder while it is locked; they remain if the process is killed."""

NO_LOCK = "PECOBOOK_NO_LOCK"
"""Environment variable that turns locking off."""

_PART_FILE = re.compile(r"\.(?:soft-)?lock-(\d+-of-\d+)")
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


class FolderBusyError(RunFolderError):
    """Another process is writing to the folder."""


def content(folder: Path) -> list[Path]:
    """Return the entries of a folder without the lock files; an empty list if there is no folder."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if path.name not in LOCK_FILES and not _PART_FILE.fullmatch(path.name)]


class FolderLock:
    """Lock a folder against all other processes until `release` or the end of this process, however it ends.

    A data-loading process, which outlives a killed run by seconds, does not hold the lock: filelock releases the lock
    in every fork.

    Args:
        folder: the folder, which must exist.
        part: the part that is locked, such as "2-of-8", so that processes with other parts of the same number of parts
            may write too. Meanwhile the caller holds the lock of the whole folder with `shared`.
        shared: whether other processes may hold parts while this one briefly holds the whole folder.
        wait: seconds to wait for a process that holds the lock.

    Raises:
        FolderBusyError: another process holds the lock.
        RunFolderError: the file system has no locks.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, *, part: str = "", shared: bool = False, wait: float = 0.0) -> None:
        ending = f"-{part}" if part else ""
        self._folder, self._wait = folder, wait
        self._lock: filelock.BaseFileLock | None = None
        self._file = folder / f".lock{ending}"
        if os.environ.get(NO_LOCK, "0") not in ("", "0"):
            return
        self._file.touch()  # an error here is one of writing, and an error below is one of locking
        text = f"part {part.replace('-of-', '/')} of '{folder}'" if part else f"'{folder}'"
        message = f"Another process is writing {text}: wait for it, or name another {'--shard' if part else '--out'}."
        self._acquire(folder / f".soft-lock{ending}", message)
        total = part.rpartition("-")[2]
        others = [] if shared else [other for other in _held_parts(folder) if other.rpartition("-")[2] != total]
        if others:
            self.release()
            raise FolderBusyError(
                f"Another process is writing part {others[0].replace('-of-', '/')} of '{folder}': wait for it, or "
                f"divide the folder into as many parts{'' if part else ', with --shard'}."
            )

    def _acquire(self, marker: Path, message: str) -> None:
        try:
            lock: filelock.BaseFileLock = filelock.FileLock(self._file, thread_local=False, fallback_to_soft=False)
            lock.acquire(timeout=self._wait, poll_interval=0.1)
        except filelock.Timeout:
            raise FolderBusyError(message) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise self._no_lock(error) from None
            # Without real locks the existence of a file is the lock. The file has another name than `.lock`, because
            # other processes try the real lock first.
            lock = filelock.SoftFileLock(marker, thread_local=False)
            try:
                lock.acquire(timeout=self._wait, poll_interval=0.1)
            except filelock.Timeout:
                raise FolderBusyError(
                    f"{message}\nOn this file system a lock remains when its process is killed: if no process is "
                    f"writing, delete '{marker}'."
                ) from None
            except OSError as error:
                raise self._no_lock(error) from None
        self._lock = lock

    def _no_lock(self, error: OSError) -> RunFolderError:
        self._file.unlink(missing_ok=True)
        return RunFolderError(
            f"'{self._folder}' cannot be locked: {first_line(error)}.\nSet {NO_LOCK}=1 to write without a lock, where "
            "no other process writes into the folder."
        )

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock and delete its file."""
        if self._lock is not None:
            self._file.unlink(missing_ok=True)  # before the release, so that another process creates a new file
            self._lock.release()


def _held_parts(folder: Path) -> list[str]:
    """Return the parts that processes hold; the files of killed processes are deleted."""
    held = []
    for part in sorted({match[1] for path in folder.iterdir() if (match := _PART_FILE.fullmatch(path.name))}):
        try:
            FolderLock(folder, part=part, shared=True).release()
        except RunFolderError:
            held.append(part)
    return held
