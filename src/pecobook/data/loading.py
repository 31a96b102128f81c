"""Batches that data-loading processes read, and what to do if one of these processes is killed.

The system kills a process if memory runs out, and a full /dev/shm ends it with a bus error. PyTorch then raises an
error wherever the main process is, even in the middle of an optimizer step. Here it is noticed only when a batch is
requested, and the main process can read the batches of the current step itself, so that the state is complete when the
step is saved.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from pecobook.errors import PecobookError

_SHARED = "/dev/shm"
_AHEAD_BYTES, _PART_BYTES = 2**29, 2**23
"""Bytes that all processes of a loader read ahead, and maximum size of a part."""
_MAX_PREFETCH = 4
"""Number of parts that a process reads ahead."""
_UNKNOWN = 16
"""Number of samples in a part if the size of a sample is unknown."""
_MUCH_WAIT = 0.2
"""Share of the time above which waiting for data is reported."""
_LATE = 2.0
"""Seconds after which a killed process is certain to be seen as ended."""
_RESCUED = {-signal.SIGKILL, -signal.SIGBUS, -signal.SIGTERM}


class WorkerError(PecobookError):
    """A data-loading process was killed or had no memory."""


@dataclass(frozen=True)
class Parts:
    """The parts in which data-loading processes read batches, so that batches in transit take bounded memory."""

    places: Iterable[list[Any]]
    size: int
    """Maximum number of samples in a part; 0 keeps batches whole."""

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in self.places:
            step = -(-len(batch) // self.count(batch))
            yield from (batch[start : start + step] for start in range(0, len(batch), step))

    def count(self, batch: list[Any]) -> int:
        """Return the number of parts of a batch, which have nearly equal sizes."""
        return -(-len(batch) // self.size) if self.size else 1


def plan(sample_bytes: int, workers: int, room: int) -> tuple[int, int]:
    """Return the maximum number of samples in a part, and how many parts each process reads ahead.

    Args:
        sample_bytes: bytes of a sample; 0 if unknown.
        workers: number of processes.
        room: free bytes of shared memory, which other runs use too.
    """
    budget = min(_AHEAD_BYTES, room // 4)
    if not sample_bytes:
        return _UNKNOWN, 2
    part_bytes = min(_PART_BYTES, budget // (2 * workers))
    size = max(part_bytes // sample_bytes, 1)
    return size, min(max(budget // (workers * size * sample_bytes), 1), _MAX_PREFETCH)


def reading_advice(data_wait: float, workers: int, num_cores: int) -> str:
    """Return a sentence on what to increase if a device often waits for data; otherwise an empty string.

    Args:
        data_wait: share of the time in which the device waits for data.
        workers: number of data-loading processes of a device.
        num_cores: number of cores for each device.
    """
    if data_wait < _MUCH_WAIT:
        return ""
    text = f"{100 * data_wait:.0f}% of the time is data wait, with --workers {workers}"
    more = min(num_cores - 1, math.ceil(max(workers, 1) / (1 - min(data_wait, 0.9))))
    if more > max(workers, 1):
        return f"{text}: give --workers {more} ({num_cores} cores for each device here)."
    return f"{text} on {num_cores} cores for each device: more cores, or smaller image files, would be faster."


class Batches(Iterator[Any]):
    """The batches of a dataset, in order, read by data-loading processes (by this process if `workers` is 0).

    Args:
        dataset: maps a position to a sample.
        places: a list of positions for each batch, such as a list of lists or a `BatchSampler`, which does not hold all
            of them; iterable more than once.
        collate: makes a batch from a list of samples.
        workers: number of processes.
        pin: whether tensors are put into page-locked memory.
        join: makes a batch from its parts. The processes then read parts of a few MB, and hold `_AHEAD_BYTES` of them
            in total; without it each of them reads two whole batches ahead.
        flag: the flag that sets the number of processes; empty if there is none.
        on_failure: called with a sentence if a process was killed; this process then reads the remaining batches. None
            raises WorkerError instead.
    """

    def __init__(
        self,
        dataset: Any,
        places: Iterable[list[Any]],
        *,
        collate: Callable[[list[Any]], Any],
        workers: int,
        pin: bool = False,
        join: Callable[[list[Any]], Any] | None = None,
        flag: str = "--workers",
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        self._dataset, self._collate, self._on_failure, self._workers = dataset, collate, on_failure, workers
        self._flag, self._join, self._left = flag, join, iter(places)
        size, prefetch = 0, 2
        if join is not None and workers:
            size, prefetch = plan(_sample_bytes(dataset, places, collate), workers, _free_shared_memory())
        self._parts = Parts(places, size)
        self._places = iter(self._parts)
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=self._parts,
            num_workers=workers,
            multiprocessing_context=_start_method() if workers else None,
            pin_memory=pin,
            collate_fn=_Shared(collate) if workers else collate,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=_new_process_group,
        )
        handler = signal.getsignal(signal.SIGCHLD)
        self._loader: Any = iter(()) if next(iter(places), None) is None else iter(loader)
        if threading.current_thread() is threading.main_thread():
            # PyTorch's own handler raises anywhere; another loader of this process may have set it before.
            is_ours = handler is not None and not getattr(handler, "__module__", "").startswith("torch.")
            signal.signal(signal.SIGCHLD, handler if is_ours else signal.SIG_DFL)

    def __next__(self) -> Any:
        parts = [self._next_part() for _ in range(self._parts.count(next(self._left)))]
        return parts[0] if len(parts) == 1 or self._join is None else self._join(parts)

    def _next_part(self) -> Any:
        places = next(self._places)
        if self._loader is not None:
            try:
                return next(self._loader)
            except PecobookError as error:  # raised in a process: without the traceback that PyTorch adds
                kind = type(error)
                text = str(error).partition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()
                raise kind(text or str(error)) from None
            except (RuntimeError, MemoryError, OSError, EOFError) as error:
                reason, can_continue = self._reason(error)
                if not reason:
                    raise
                self._loader = None
                if self._on_failure is None or not can_continue:
                    raise WorkerError(reason) from None
                self._on_failure(reason)
        return self._collate([self._dataset[place] for place in places])

    def _reason(self, error: Exception) -> tuple[str, bool]:
        """Return why a batch did not arrive, and whether this process can read it; an empty string for other errors."""
        if not self._workers:
            return "", False
        if "shared memory" in str(error) or "/torch_" in str(error):
            return _no_shared_memory(), True
        if isinstance(error, MemoryError):
            return f"A data-loading process had no memory left. {self._remedy()}", True
        for worker in getattr(self._loader, "_workers", []):
            if isinstance(error, OSError | EOFError):  # the connection is closed before the process counts as ended
                worker.join(_LATE / self._workers)
            code = worker.exitcode
            if code == -signal.SIGBUS:
                return _no_shared_memory(), True
            if code:
                how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"
                likely = ", most likely because memory ran out" if code == -signal.SIGKILL else ""
                return f"A data-loading process {how}{likely}. {self._remedy()}", code in _RESCUED
        return "", False

    def _remedy(self) -> str:
        if not self._flag:
            return "Free memory, then start again."
        return f"Take fewer {self._flag} (now {self._workers}) or more memory."


def _start_method() -> str | None:
    """Return how processes start: on Linux as forks, which share the list of images, unless the program chose a method.

    From Python 3.14 on, the default is a process that imports everything again.
    """
    return "fork" if sys.platform == "linux" and multiprocessing.get_start_method(allow_none=True) is None else None


def _sample_bytes(dataset: Any, places: Iterable[list[Any]], collate: Callable[[list[Any]], Any]) -> int:
    """Return the bytes of the first sample's tensors; 0 if it cannot be read, or if there is none."""
    with contextlib.suppress(Exception):  # raised again when its batch is requested
        return _num_bytes(collate([dataset[next(iter(places))[0]]]))
    return 0


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(_num_bytes, items))


def _free_shared_memory() -> int:
    try:
        room = os.statvfs(_SHARED)
    except OSError:  # not Linux
        return 4 * _AHEAD_BYTES
    return room.f_bavail * room.f_frsize


def _no_shared_memory() -> str:
    room = os.statvfs(_SHARED)
    size = room.f_blocks * room.f_frsize / 2**20
    return (
        f"A data-loading process found no room in {_SHARED}, which has {size:,.0f} MB. Give it more (in containers "
        "--shm-size 8g), or take fewer --workers."
    )


class _Shared:
    """Puts a batch's tensors into shared memory, where an error is noticed; PyTorch would lose the batch."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        batch = self._collate(samples)
        if get_worker_info() is not None:
            _share(batch)
        return batch


def _share(value: Any) -> None:
    if isinstance(value, Tensor):
        value.share_memory_()  # type: ignore[no-untyped-call]
    elif isinstance(value, dict):
        _share(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            _share(item)


def _new_process_group(_worker: int) -> None:
    """Leave the process group: its Ctrl-C or SIGTERM is for the trainer, which saves before it ends its workers."""
    os.setpgid(0, 0)
