"""Reads images from remote parquet files: a row group is requested when one of its images is first read.

The images of a row group are kept in the cache (remote_cache.py) as a memory-mapped Arrow file. Files with small row
groups (the hub's have 100 rows) and `--shuffle-window` need the fewest requests.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from pecobook.data.remote import RemotePath, RemoteReader
from pecobook.data.remote_cache import into_cache, locked, say_not_kept
from pecobook.data.source import Integers
from pecobook.data.table_store import TableStore

_MAX_OPEN = 8
"""Number of row groups that a process keeps mapped."""


class RowGroupStore(TableStore):
    """A column of encoded images in remote parquet files.

    Args:
        files: the files.
        footers: the metadata of each file.
        column: the name of the column.
        identity: text that identifies the rows; it is part of the fingerprint.
    """

    def __init__(self, files: list[RemotePath], footers: list[Any], column: str, identity: str) -> None:
        counts = [[footer.row_group(n).num_rows for n in range(footer.num_row_groups)] for footer in footers]
        rows = [(str(file), footer.num_rows) for file, footer in zip(files, footers, strict=True)]
        groups = RowGroups(files, counts, column)
        super().__init__(groups, column, rows, identity)

    def files(self, rows: Integers) -> None:  # type: ignore[override]
        """Return None: no file on this machine contains the rows."""

    def num_bytes(self) -> int:
        """Return 0: the images' sizes are unknown until they are read."""
        return 0

    def digest(self, rows: Integers) -> str:
        """Return a hash of the files' names, sizes and footers, and of the row numbers."""
        return hashlib.sha256(self._identity.encode() + rows.astype("<i8").tobytes()).hexdigest()


class RowGroups:
    """The rows of parquet files, read one row group at a time."""

    def __init__(self, files: list[RemotePath], counts: list[list[int]], column: str) -> None:
        self._files, self._column = files, column
        self._group_of = [(file, number) for file, groups in enumerate(counts) for number in range(len(groups))]
        self._starts = np.cumsum([0, *(count for groups in counts for count in groups)])
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        if group not in self._open:
            self._open[group] = self._map(group)
            while len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(group)
        return {self._column: self._open[group][row - int(self._starts[group])].as_py()}

    def _map(self, group: int) -> Any:
        """Return the column of a row group, requesting it if it is not in the cache."""
        import pyarrow as pa

        path, number = self._files[self._group_of[group][0]], self._group_of[group][1]
        file, table = path.cached(f"{self._column}-{number:06d}.arrow"), None
        try:
            with locked(file, number):  # another process may be requesting it
                with contextlib.suppress(OSError, pa.ArrowException):  # absent, or cut short when the power failed
                    table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
                    os.utime(file)
                if table is None:
                    table = self._request(path, number)
                    table = _keep(table, file)
        except OSError as error:  # no space, or no writable cache: the row group is used directly
            say_not_kept(error)
            table = self._request(path, number) if table is None else table
        return table.column(self._column)

    def _request(self, path: RemotePath, number: int) -> Any:
        import pyarrow.parquet as pq

        with pq.ParquetFile(RemoteReader(path, keep=False)) as opened:
            return opened.read_row_group(number, columns=[self._column])


def _keep(table: Any, file: Path) -> Any:
    """Write a table to the cache, and return it mapped from there."""
    import pyarrow as pa

    with into_cache(file) as unfinished:
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return pa.ipc.open_file(pa.memory_map(str(unfinished))).read_all()


def read_columns(files: list[RemotePath], columns: list[str]) -> Any:
    """Return columns without images of all files as a `datasets.Dataset`; the files must have the same columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    tables = [pq.read_table(RemoteReader(file, keep=False), columns=columns) for file in files]
    return Dataset(pa.concat_tables(tables))
