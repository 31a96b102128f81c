"""Schedules: pure functions of the step, so that a checkpoint stores no other state of them."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, total: int, warmup: int, peak: float, final: float = 0.0) -> float:
    """Rise linearly over `warmup` steps to `peak`, then fall by a half cosine that reaches `final` at step `total`.

    Step 0, the first step, already uses peak / warmup if there is a warm-up, so no step has rate 0.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def warmup_poly(step: int, *, total: int, warmup: int, peak: float, final: float = 0.0, power: float = 1.0) -> float:
    """Rise like `warmup_cosine`, then fall to `final` as the remaining share of the training to the power `power`.

    With power 1 the rate falls linearly: the paper's schedule for segmentation (section 4).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    remaining = 1 - min((step - warmup) / max(total - warmup, 1), 1.0)
    return final + (peak - final) * float(remaining**power)


def warmup_steps(step: int, *, warmup: int, peak: float, milestones: tuple[int, ...]) -> float:
    """Rise like `warmup_cosine`, then divide the rate by ten at each step in `milestones`, as usual in detection."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * float(0.1 ** sum(step >= milestone for milestone in milestones))


def warmup_constant(step: int, *, total: int, warmup: int, peak: float, cooldown: int, final: float = 0.0) -> float:
    """Rise like `warmup_cosine`, stay at `peak`, and fall linearly over the last `cooldown` steps to `final`.

    The rate before step `total - cooldown` does not depend on `total`, so that a run can be extended.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    cooled = max(step - (total - cooldown), 0) / max(cooldown, 1)
    return peak + (final - peak) * min(cooled, 1.0)


def cosine(step: int, *, total: int, start: float, end: float) -> float:
    """Follow a half cosine from `start` at step 0 to `end` at step `total`."""
    progress = min(step / max(total, 1), 1.0)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def is_time(step: int, every: int, total: int) -> bool:
    """Return whether an action repeated every `every` steps is due after `step` steps; it always is after the last."""
    return step == total or step % every == 0
