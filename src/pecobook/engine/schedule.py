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


def warmup_poly(step: int, *, total: int, warmup: int, peak: float, final: float = 0.0, power: float = 1.0) -> float:
    """Linear to `peak` as `warmup_cosine`, then the remaining share of the training to a power; 1 is a straight line.

    With power 1 this is the paper's schedule of segmentation (section 4).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    left = 1 - min((step - warmup) / max(total - warmup, 1), 1.0)
    return final + (peak - final) * float(left**power)


def warmup_steps(step: int, *, warmup: int, peak: float, falls: tuple[int, ...], factor: float = 0.1) -> float:
    """Linear to `peak` as `warmup_cosine`, then times `factor` from each step in `falls` on, as detection does."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * float(factor ** sum(step >= fall for fall in falls))


def cosine(step: int, *, total: int, start: float, end: float) -> float:
    """Half cosine from `start` at step 0 to `end` at step `total`."""
    progress = min(step / max(total, 1), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def is_time(step: int, every: int, total: int) -> bool:
    """Whether something due every `every` steps is due after `step` steps are done; always after the last."""
    return step == total or step % every == 0
