"""Schedules: pure functions of the step, so that a checkpoint holds one integer."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, total: int, warmup: int, peak: float, final: float = 0.0) -> float:
    """Linear from 0 over `warmup` steps to `peak`, then a half cosine that reaches `final` at step `total`.

    Step 0 is the first: with a warm-up, it already takes peak / warmup, so that no step is wasted at rate 0.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def cosine(step: int, *, total: int, start: float, end: float) -> float:
    """Half cosine from `start` at step 0 to `end` at step `total`."""
    progress = min(step / max(total, 1), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def is_time(step: int, every: int, total: int) -> bool:
    """Whether something due every `every` steps is due after `step` steps are done; always after the last."""
    return step == total or step % every == 0
