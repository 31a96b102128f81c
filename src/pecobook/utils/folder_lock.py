"""A lock on a folder: only one process at a time writes into the folder."""

from __future__ import annotations

import errno
from pathlib import Path

from pecobook.errors import RunFolderError

LOCK_FILES = frozenset({".lock", ".soft-lock"})
"""Files in a folder while it is locked; they also remain after the process was killed."""

_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}


def content(folder: Path) -> list[Path]:
    """Return the entries of a folder without the lock files; an empty list where there is no folder."""
    return [path for path in folder.iterdir() if path.name not in LOCK_FILES] if folder.is_dir() else []


class FolderLock:
    """Lock a folder against all other processes until `release` or the end of this process, however it ends.

    A data-loading process, which outlives a killed run by seconds, does not hold the lock: filelock releases the lock
    in every fork.

    Args:
        folder: the folder, which must exist.

    Raises:
        RunFolderError: another process holds the lock.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        import filelock

        self._file = folder / ".lock"
        self._lock: filelock.BaseFileLock = filelock.FileLock(self._file, thread_local=False, fallback_to_soft=False)
        message = f"Another process is writing '{folder}': wait for it, or name another --out."
        try:
            self._lock.acquire(blocking=False)
        except filelock.Timeout:
            raise RunFolderError(message) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            # Without real locks the existence of a file is the lock. The file has another name than `.lock`, because
            # other processes try the real lock first.
            marker = folder / ".soft-lock"
            self._lock = filelock.SoftFileLock(marker, thread_local=False)
            try:
                self._lock.acquire(blocking=False)
            except filelock.Timeout:
                raise RunFolderError(
                    f"{message}\nOn this file system a lock remains when its process is killed: if no process is "
                    f"writing, delete '{marker}'."
                ) from None

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock and delete its file."""
        self._file.unlink(missing_ok=True)  # before the release, so that another process creates a new file
        self._lock.release()
