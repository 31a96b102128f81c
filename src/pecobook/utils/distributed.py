"""Collective operations for models and stages; each also works in a single process."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from pecobook.errors import PecobookError, RunFolderError, first_line
from pecobook.utils.files import write_atomically

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def on_first_rank(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 while the other ranks wait. An error on rank 0 ends all ranks, so that none waits forever.

    Returns:
        what `work` returned on rank 0, on every rank; it must be small and picklable.

    Raises:
        RunFolderError: on the other ranks, with the message of rank 0's error.
    """
    if world_size() == 1:
        return work()
    value: list[Any] = [None]

    def work_or_wait() -> None:
        if dist.get_rank() == 0:
            value[0] = work()

    on_all_ranks(work_or_wait)
    dist.broadcast_object_list(value, src=0)
    return value[0]  # type: ignore[no-any-return]


def long_on_first_rank(work: Callable[[], T], period: float = 10.0) -> T:
    """Like `on_first_rank`, for work that may take longer than a collective operation may wait.

    The ranks exchange a heartbeat every `period` seconds; `work` runs in a separate thread on rank 0.
    """
    if world_size() == 1:
        return work()
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(work) if dist.get_rank() == 0 else None
        is_done = [False]
        while not is_done[0]:
            if future is not None:
                is_done = [not wait([future], period).not_done]
            dist.broadcast_object_list(is_done, src=0)
        return on_first_rank(lambda: future.result())  # type: ignore[union-attr]  # on rank 0 alone


_PART_BYTES = 2**22
_sharing: Sharing | None = None


class _Folder:
    """A store in a folder, in which a process finds what the process that started it has left there."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def _file(self, name: str) -> Path:
        return self._folder / hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()

    def set(self, name: str, value: str | bytes) -> None:
        """Keep a value; one that cannot be written, as on a full disk, is recomputed by whoever needs it."""
        with contextlib.suppress(OSError):
            write_atomically(self._file(name), value.encode() if isinstance(value, str) else value)

    def get(self, name: str) -> bytes:
        """Return a value."""
        return self._file(name).read_bytes()

    def check(self, names: list[str]) -> bool:
        """Return whether the values are there; nothing is added while another process looks."""
        return names == ["closed"] or all(self._file(name).is_file() for name in names)


class Sharing:
    """What the first process computes for all, within `sharing`: shared through their address store, or a folder."""

    _rounds = 0

    def __init__(self, folder: str, *, is_first: bool) -> None:
        self._made: dict[str, Any] = {}
        self._store: Any = _Folder(folder)
        self._is_first = is_first
        if world_size() > 1:
            Sharing._rounds += 1  # every rank enters equally often
            self._store = PrefixStore(f"pecobook/{Sharing._rounds}", dist.distributed_c10d._get_default_store())
            self._is_first = dist.get_rank() == 0

    def get(self, name: str, make: Callable[[], T]) -> T:
        """Return what `make` returns on rank 0; see `made_by_first_rank`."""
        if name not in self._made:
            self._made[name] = self._make(name, make) if self._is_first else self._receive(name, make)
        return self._made[name]  # type: ignore[no-any-return]

    def _make(self, name: str, make: Callable[[], T]) -> T:
        number = 0
        try:
            value = make()
            data = zlib.compress(pickle.dumps(value), 1)
            for start in range(0, len(data), _PART_BYTES):
                self._store.set(f"{name}/{number}", data[start : start + _PART_BYTES])
                number += 1
            return value
        except BaseException:
            number = 0
            raise
        finally:
            self._store.set(name, str(number))

    def _receive(self, name: str, make: Callable[[], T]) -> T:
        while not self._store.check([name]):
            if self._store.check(["closed"]) and not self._store.check([name]):
                return make()
            time.sleep(0.05)
        try:
            parts = [self._store.get(f"{name}/{number}") for number in range(int(self._store.get(name)))]
        except OSError:  # a part that could not be written
            return make()
        return pickle.loads(zlib.decompress(b"".join(parts))) if parts else make()

    def close(self) -> None:
        """Make the other ranks compute what rank 0 has not."""
        if self._is_first:
            self._store.set("closed", "")


@contextmanager
def sharing(folder: str = "", *, is_first: bool = True) -> Iterator[None]:
    """Let rank 0 compute what `made_by_first_rank` asks for, within this context, which all ranks enter.

    Args:
        folder: where processes that the first one starts later find its results; empty if there are none.
        is_first: whether this process is the first of these.
    """
    global _sharing
    _sharing = Sharing(folder, is_first=is_first) if folder or world_size() > 1 else None
    try:
        yield
    finally:
        if _sharing is not None:
            _sharing.close()
        _sharing = None


def made_by_first_rank(name: str, make: Callable[[], T]) -> T:
    """Return rank 0's result of `make` on every rank, within `sharing`; elsewhere each rank computes it itself.

    The value goes through the processes' address store, not through a collective operation: a rank that fails before,
    or asks for something else, makes no rank wait. If rank 0 raises an error, the others call `make` too.

    Args:
        name: what is computed; a second call with the same name returns the same value.
        make: returns a picklable value.
    """
    return make() if _sharing is None else _sharing.get(name, make)


def on_all_ranks(work: Callable[[], T]) -> T:
    """Call `work` on every rank and return its value; an error on one rank ends all, so that none waits forever.

    Raises:
        RunFolderError: on the ranks without an error, with the message of the first rank that has one.
    """
    if world_size() == 1:
        return work()
    failure: Exception | None = None
    try:
        value = work()
    except Exception as error:
        failure = error
    own = f"{type(failure).__name__}: {first_line(failure)}" if failure else None
    messages = gather_objects(str(failure) if isinstance(failure, PecobookError) else own)
    first = next((rank for rank, message in enumerate(messages) if message is not None), None)
    if first is None:
        return value
    if failure is None:
        failure = RunFolderError(f"rank {first}: {messages[first]}" if first else messages[0])
    if isinstance(failure, PecobookError):
        failure.on_all_ranks = True
    raise failure


def gather_objects(value: T) -> list[T]:
    """Return the small, picklable values of all ranks, in rank order."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, in rank order, without gradient; every rank must hold equally many rows."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of a detached tensor over all ranks."""
    if world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / world_size()
