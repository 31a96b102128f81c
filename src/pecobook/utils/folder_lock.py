"""A lock on a folder: one process at a time writes it."""

from __future__ import annotations

import errno
from pathlib import Path

from pecobook.errors import RunFolderError

LOCK_FILES = frozenset({".lock", ".soft-lock"})
"""What lies in a folder while it is locked, and in one whose process was killed."""

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


def content(folder: Path) -> list[Path]:
    """All that lies in a folder but its lock; nothing where there is no folder."""
    return [path for path in folder.iterdir() if path.name not in LOCK_FILES] if folder.is_dir() else []


class FolderLock:
    """Keeps all others out of a folder until `release` or the end of this process, however it ends.

    A data-loading process, which outlives a killed run by seconds, does not keep it: filelock lets go in every fork.

    Args:
        folder: the folder, which must exist.

    Raises:
        RunFolderError: another process has it.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        import filelock

        self._file = folder / ".lock"
        self._lock: filelock.BaseFileLock = filelock.FileLock(self._file, thread_local=False, fallback_to_soft=False)
        refused = f"Another process is writing '{folder}': wait for it, or name another --out."
        try:
            self._lock.acquire(blocking=False)
        except filelock.Timeout:
            raise RunFolderError(refused) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            # A file that is there is the lock then. It has a name of its own, since others try the real lock first.
            marker = folder / ".soft-lock"
            self._lock = filelock.SoftFileLock(marker, thread_local=False)
            try:
                self._lock.acquire(blocking=False)
            except filelock.Timeout:
                raise RunFolderError(
                    f"{refused}\nThis file system has no locks that end with their process: if none is, delete "
                    f"'{marker}'."
                ) from None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the folder back, without a trace of the lock."""
        self._file.unlink(missing_ok=True)  # before it is free: who opens it from now on makes another
        self._lock.release()
