"""What models and stages ask of the other processes; each works in a process alone too."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from pecobook.errors import PecobookError, RunFolderError, first_line


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def on_first_rank(work: Callable[[], None]) -> None:
    """Let rank 0 work and the others wait for it. What ends it there ends all, so that none waits for ever.

    Raises:
        RunFolderError: on the other ranks, with what rank 0 raises itself.
    """
    if world_size() == 1:
        return work()
    failed: Exception | None = None
    if dist.get_rank() == 0:
        try:
            work()
        except Exception as error:
            failed = error
    own = isinstance(failed, PecobookError)
    said = [None if failed is None else str(failed) if own else f"{type(failed).__name__}: {first_line(failed)}"]
    dist.broadcast_object_list(said, src=0)
    if said[0] is None:
        return None
    raised = RunFolderError(said[0]) if failed is None else failed
    if isinstance(raised, PecobookError):
        raised.on_all_ranks = True
    raise raised


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks, in rank order, without gradient; every rank must hold equally many."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a detached tensor over all ranks, of its shape."""
    if world_size() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / world_size()
