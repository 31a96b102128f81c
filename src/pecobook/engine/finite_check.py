"""What all ranks must do alike after a step: end at once when something is not finite, or stop when asked to.

On a CPU the answer is there at once. On a GPU it is copied in the background and read one step later, so that no step
waits for the device: a broken step is then known after its optimizer step, and nothing is saved or measured before
`wait` has looked.
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
    """float (4,), on the host once `copied` is done: broken and stop of all ranks; loss and gradient norm of this."""
    copied: Any


class FiniteCheck:
    """Collects flags of all ranks each step.

    Args:
        world_size: ranks.
        late: read the answer one step later.
    """

    def __init__(self, world_size: int, *, late: bool) -> None:
        self.world_size, self.late = world_size, late
        self._pending: _Pending | None = None

    def after_backward(self, step: int, loss: Tensor, norm: Tensor, *, may_overflow: bool, stop: bool) -> bool:
        """Ask all ranks about step number `step` (from 1); returns whether to stop, as known by now.

        Args:
            step: the step.
            loss: () detached.
            norm: () of the gradient.
            may_overflow: whether gradients may be infinite, as in fp16, whose scaler leaves out such steps.
            stop: whether this rank was asked to stop.

        Raises:
            NonFiniteLossError: on all ranks, when any has seen a loss or gradient that is not finite.
        """
        broken = ~loss.isfinite() if may_overflow else ~(loss.isfinite() & norm.isfinite())
        # Filled on the device: a tensor made from a number is copied there, and the host waits for all that runs.
        asked = torch.full_like(loss, float(stop), dtype=torch.float32)
        flags = torch.stack([broken.float(), asked])
        if self.world_size > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        answer = torch.cat([flags, torch.stack([loss.float(), norm.float()])])
        known = self.wait() if self.late else False
        self._pending = self._copy(step, answer)
        return known if self.late else self.wait()

    def wait(self) -> bool:
        """Wait for what was asked last; returns whether to stop. Raises as `after_backward`."""
        if self._pending is None:
            return False
        pending, self._pending = self._pending, None
        if pending.copied is not None:
            pending.copied.synchronize()
        broken, stop, loss, norm = pending.answer.tolist()
        if broken:
            left = "its last checkpoint is whole" if self.late else "the weights were not touched"
            raise NonFiniteLossError(
                f"Step {pending.step} is not finite (loss {loss:g}, gradient norm {norm:g} here); {left}.\n"
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
