"""The cache of remote files: parts of them, in a folder that the processes of a machine share.

The least recently used parts are removed if the folder grows beyond its limit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from pecobook.errors import ConfigError, first_line
from pecobook.utils.printer import say_once

LIMIT_VARIABLE = "PECOBOOK_REMOTE_CACHE_GB"
_LIMIT_GB = 50.0
_SCAN_BYTES = 2**26
"""Number of bytes that a process writes before it checks the size of the cache."""
_ABANDONED = 3600.0
"""Seconds after which an unfinished file is attributed to a killed process."""
_USED_AGAIN = 60.0
"""Seconds after which the use of a file is recorded again."""

_written = 0


def cache_folder(name: str = "remote") -> Path:
    """Return the path of an entry of pecobook's cache; `remote` is the folder of the blocks."""
    return Path(os.environ.get("PECOBOOK_CACHE") or Path.home() / ".cache" / "pecobook").expanduser() / name


@contextlib.contextmanager
def locked(file: Path, number: int) -> Iterator[None]:
    """Let one process at a time create a file of the cache. Raises OSError if the cache cannot be written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(file.with_name(f".{number % 64}.lock")))
        except NotImplementedError as error:  # a file system without locks
            raise OSError(first_line(error)) from None
        yield


@contextlib.contextmanager
def into_cache(file: Path) -> Iterator[Path]:
    """Yield a temporary path for a cache file, which is moved to its own path once complete, and removed on failure."""
    unfinished = file.with_name(f".{file.name}-{os.getpid()}.tmp")
    try:
        yield unfinished
        size = unfinished.stat().st_size
        unfinished.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    _count_written(size)  # which may remove the file again, if it is larger than the cache


def say_not_kept(error: OSError) -> None:
    """Say once, in the first process, that the cache cannot be written."""
    say_once(
        "cache of remote files",
        f"Warning: the cache '{cache_folder()}' cannot be written ({error.strerror or error}), so what is read is "
        "requested each time. PECOBOOK_CACHE names another place.",
    )


def read_cached(file: Path, start: int, stop: int) -> bytes | None:
    """Return bytes of a cache file; None if it does not contain them."""
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError:  # absent, or of another user
        return None
    try:
        if time.time() - os.fstat(descriptor).st_mtime > _USED_AGAIN:
            with contextlib.suppress(OSError):
                os.utime(file)
        data = os.pread(descriptor, stop - start, start)
        return data if len(data) == stop - start else None  # cut short when the power failed
    finally:
        os.close(descriptor)


def _count_written(size: int) -> None:
    """Record that this process has added `size` bytes, and check the size of the cache now and then."""
    global _written
    _written += size
    if _written >= _SCAN_BYTES:
        _written = 0
        remove_unused()


def limit_bytes() -> int:
    """Return the largest size of the cache that the environment variable allows; 50 GB if it is not set."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    try:
        limit = float(text or _LIMIT_GB)
    except ValueError:
        limit = -1.0
    if not limit > 0:
        raise ConfigError(f"The environment variable {LIMIT_VARIABLE} is '{text}': it must be a number of GB above 0.")
    return int(limit * 1e9)


def remove_unused() -> None:
    """Remove the least recently used blocks until nine tenths of the limit are left."""
    root = cache_folder()
    entries = []
    for folder in root.iterdir() if root.is_dir() else ():
        with contextlib.suppress(OSError), os.scandir(folder) as blocks:
            for block in blocks:
                with contextlib.suppress(OSError):  # of another user, or removed by another process
                    status = block.stat()
                    if block.name.endswith(".tmp") and time.time() - status.st_mtime > _ABANDONED:
                        os.unlink(block.path)  # noqa: PTH108 (of a process that was killed)
                    elif not block.name.startswith("."):
                        entries.append((status.st_mtime, status.st_size, block.path))
    total = sum(size for _, size, _ in entries)
    limit = min(limit_bytes(), total + shutil.disk_usage(root).free // 2) if entries else 0
    if total <= limit:
        return
    for _, size, block_path in sorted(entries):
        if total <= 0.9 * limit:
            return
        with contextlib.suppress(OSError):
            os.unlink(block_path)  # noqa: PTH108 (a text of scandir)
            total -= size
