"""Batches that data-loading processes read, and what to do when one of these processes is killed.

The system kills a process where memory runs out, and a full /dev/shm ends it with a bus error. PyTorch then raises an
error wherever the main process is, also in the middle of an optimizer step. Here it is noticed only where a batch is
asked for, and the main process can read the batches of the present step itself, so that the state is whole when the
step is saved.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from pecobook.errors import PecobookError

_SHARED = "/dev/shm"
_LATE = 2.0
"""Seconds after which a killed process is surely seen as ended."""
_RESCUED = {-signal.SIGKILL, -signal.SIGBUS, -signal.SIGTERM}


class Places(Protocol):
    """The places of each batch, such as a list of lists or a `BatchSampler`, which holds no list of all."""

    def __iter__(self) -> Iterator[list[Any]]: ...

    def __len__(self) -> int: ...


class WorkerError(PecobookError):
    """A data-loading process was killed or had no memory."""


class Batches(Iterator[Any]):
    """The batches of a dataset, in order, read by data-loading processes (by this process if `workers` is 0).

    Args:
        dataset: maps a place to a sample.
        places: the places of each batch, a list for each; iterable more than once.
        collate: makes a batch of a list of samples.
        workers: number of processes.
        pin: whether tensors are put into page-locked memory.
        prefetch: number of batches that each process reads ahead.
        flag: the flag that sets the number of processes; empty where there is none.
        on_failure: called with a sentence when a process was killed; this process then reads the further batches. None
            raises WorkerError instead.
    """

    def __init__(
        self,
        dataset: Any,
        places: Places,
        *,
        collate: Callable[[list[Any]], Any],
        workers: int,
        pin: bool = False,
        prefetch: int = 2,
        flag: str = "--workers",
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        self._dataset, self._collate, self._on_failure, self._workers = dataset, collate, on_failure, workers
        self._flag = flag
        self._places = iter(places)
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=places,
            num_workers=workers,
            pin_memory=pin,
            collate_fn=_Shared(collate) if workers else collate,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=_new_process_group,
        )
        handler = signal.getsignal(signal.SIGCHLD)
        self._loader: Any = iter(loader) if len(places) else iter(())
        if threading.current_thread() is threading.main_thread():
            # PyTorch's own handler raises at any place; another loader of this process may have set it before.
            is_ours = handler is not None and not getattr(handler, "__module__", "").startswith("torch.")
            signal.signal(signal.SIGCHLD, handler if is_ours else signal.SIG_DFL)

    def __next__(self) -> Any:
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
        """Return why a batch did not come, and whether this process can read it; an empty text for another error."""
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


def _no_shared_memory() -> str:
    room = os.statvfs(_SHARED)
    size = room.f_blocks * room.f_frsize / 2**20
    return (
        f"A data-loading process found no room in {_SHARED}, which has {size:,.0f} MB. Give it more (in containers "
        "--shm-size 8g), or take fewer --workers."
    )


class _Shared:
    """Puts the tensors of a batch into shared memory where an error is seen; PyTorch would lose the batch."""

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
