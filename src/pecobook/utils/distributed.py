"""Collective operations of models and stages; each also works in a single process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pecobook.errors import PecobookError, RunFolderError, first_line

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def on_first_rank(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 while the other ranks wait. An error on rank 0 ends all ranks, so that none waits forever.

    Returns:
        what `work` returned on rank 0, on every rank; it must be small and picklable.

    Raises:
        RunFolderError: on the other ranks, with the message of the error that rank 0 raises.
    """
    if world_size() == 1:
        return work()
    failure: Exception | None = None
    answer: list[Any] = [None, None]  # the message of an error, and the value
    if dist.get_rank() == 0:
        try:
            answer[1] = work()
        except Exception as error:
            failure = error
    if failure is not None:
        user_error = isinstance(failure, PecobookError)
        answer[0] = str(failure) if user_error else f"{type(failure).__name__}: {first_line(failure)}"
    dist.broadcast_object_list(answer, src=0)
    if answer[0] is None:
        return answer[1]  # type: ignore[no-any-return]
    raised = RunFolderError(answer[0]) if failure is None else failure
    if isinstance(raised, PecobookError):
        raised.on_all_ranks = True
    raise raised


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, in rank order, without gradient; every rank must hold equally many rows."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of a detached tensor over all ranks, of the tensor's shape."""
    if world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / world_size()
