"""Decisions that all ranks must share after a step: end if loss or gradient is not finite, or stop on a signal.

On a CPU the answer is available immediately. On a GPU it is copied in the background and read one step later, so that
no step waits for the device: a non-finite step is then reported after its optimizer step, and nothing is saved or
measured before `wait` has read the answer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pecobook.errors import NonFiniteLossError


class _Pending(NamedTuple):
    step: int
    answer: Tensor
    """Float (4,), on the host once `copied` is done: non-finite and stop flags of all ranks, this rank's loss and
    gradient norm."""
    copied: Any


class FiniteCheck:
    """Collect the flags of all ranks each step.

    Args:
        world_size: number of ranks.
        late: read the answer one step later.
    """

    def __init__(self, world_size: int, *, late: bool) -> None:
        self.world_size, self.late = world_size, late
        self._pending: _Pending | None = None

    def after_backward(self, step: int, loss: Tensor, norm: Tensor, *, may_overflow: bool, stop: bool) -> bool:
        """Combine the flags of all ranks for step number `step` (from 1); return whether to stop.

        Args:
            step: number of the step.
            loss: loss (), detached.
            norm: norm () of the gradient.
            may_overflow: whether gradients may be infinite, as in fp16, whose scaler skips such steps.
            stop: whether this rank received a signal to stop.

        Returns:
            Whether to stop after this step or, with `late`, after the previous step.

        Raises:
            NonFiniteLossError: on all ranks, if any rank has a loss or gradient that is not finite.
        """
        non_finite = ~loss.isfinite() if may_overflow else ~(loss.isfinite() & norm.isfinite())
        # Filled on the device: to copy a number from the host would wait for everything that runs on the device.
        stop_flag = torch.full_like(loss, float(stop), dtype=torch.float32)
        flags = torch.stack([non_finite.float(), stop_flag])
        if self.world_size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        answer = torch.cat([flags, torch.stack([loss.float(), norm.float()])])
        stop_after_previous = self.wait() if self.late else False
        self._pending = self._copy(step, answer)
        return stop_after_previous if self.late else self.wait()

    def wait(self) -> bool:
        """Wait for the last answer; return whether to stop. Raises the errors of `after_backward`."""
        if self._pending is None:
            return False
        pending, self._pending = self._pending, None
        if pending.copied is not None:
            pending.copied.synchronize()
        non_finite, stop, loss, norm = pending.answer.tolist()
        if non_finite:
            state = "the last checkpoint is intact" if self.late else "the weights were not changed"
            raise NonFiniteLossError(
                f"Step {pending.step} is not finite (loss {loss:g}, gradient norm {norm:g} here); {state}.\n"
                "Try a lower --optim.lr, a longer --optim.warmup, --optim.clip-grad 1, or --precision fp32;\n"
                "then start again with --overwrite, or in a new --out."
            )
        return bool(stop)

    def _copy(self, step: int, answer: Tensor) -> _Pending:
        if answer.device.type != "cuda":
            return _Pending(step, answer, None)
        host = torch.empty(answer.shape, dtype=answer.dtype, pin_memory=True)
        host.copy_(answer, non_blocking=True)
        copied: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
        return _Pending(step, host, copied)
