"""Collective operations of models and stages; each also works in a single process."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from pecobook.errors import PecobookError, RunFolderError, first_line


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def on_first_rank(work: Callable[[], None]) -> None:
    """Call `work` on rank 0 while the other ranks wait. An error on rank 0 ends all ranks, so that none waits forever.

    Raises:
        RunFolderError: on the other ranks, with the message of the error that rank 0 raises.
    """
    if world_size() == 1:
        return work()
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            work()
        except Exception as error:
            failure = error
    message: list[str | None] = [None]
    if failure is not None:
        user_error = isinstance(failure, PecobookError)
        message = [str(failure) if user_error else f"{type(failure).__name__}: {first_line(failure)}"]
    dist.broadcast_object_list(message, src=0)
    if message[0] is None:
        return None
    raised = RunFolderError(message[0]) if failure is None else failure
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
