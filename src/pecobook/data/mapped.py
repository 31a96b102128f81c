"""Puts a source's large columns, names and integers, into memory-mapped files.

The pages of such a file belong to the system, which drops unused ones and reads them again; forked processes share
them. A process's own memory then does not grow with the number of images.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from pecobook.data.remote_cache import cache_folder
from pecobook.errors import first_line
from pecobook.utils.printer import say_once

LEAST_BYTES = 2**24
"""Minimum size in bytes of a column that is mapped."""
_MOUNTS = Path("/proc/self/mountinfo")

T = TypeVar("T")


def mapped(column: T) -> T:
    """Return a column whose memory is an unnamed file, which disappears with the last process that maps it.

    A column below 16 MiB, and one that does not fit into the cache, is returned unchanged.

    Args:
        column: a NumPy array, or an Arrow array, in one part or several.

    Returns:
        the same values, read-only. Pickling stores the values.
    """
    if column.nbytes < LEAST_BYTES:  # type: ignore[attr-defined]
        return column
    folder = cache_folder("columns")
    try:
        found: T = (_of_array if isinstance(column, np.ndarray) else _of_arrow)(column, folder)
    except OSError as error:
        say_once(
            "mapped columns",
            "Warning: the names and labels of the images stay in the memory of each process, because the cache "
            f"'{folder}' cannot take them ({error.strerror or first_line(error)}). PECOBOOK_CACHE names another place.",
        )
        return column
    return found


def _of_array(array: Any, folder: Path) -> Any:
    whole = np.ascontiguousarray(array)
    memory = _file(folder, array.nbytes, lambda file: file.write(whole.data))
    return np.frombuffer(memory, array.dtype).reshape(array.shape)


def _of_arrow(column: Any, folder: Path) -> Any:
    import pyarrow as pa

    table = pa.Table.from_arrays([column], names=["column"])

    def write(file: IO[bytes]) -> None:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)

    memory = _file(folder, column.nbytes, write)
    found = pa.ipc.open_file(pa.py_buffer(memory)).read_all().column(0)
    return found if isinstance(column, pa.ChunkedArray) else found.chunk(0)


def _file(folder: Path, size: int, write: Callable[[IO[bytes]], object]) -> mmap.mmap:
    """Return the memory of a file that `write` has filled. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    if _is_memory(folder):
        raise OSError("it lies in memory")
    if size > shutil.disk_usage(folder).free // 2:
        raise OSError("its disk has little room")
    with tempfile.TemporaryFile(dir=folder) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())  # which also raises delayed errors, such as that of a full network disk
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _is_memory(folder: Path) -> bool:
    """Return whether a folder's files are held in memory."""
    device = folder.stat().st_dev
    with contextlib.suppress(OSError):  # not Linux
        for line in os.fsdecode(_MOUNTS.read_bytes()).splitlines():
            mount, _, kind = line.partition(" - ")
            if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
                return kind.split()[0] in ("tmpfs", "ramfs")
    return False
