"""The training hook: a user's function that is called after each optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import nn


class Step(NamedTuple):
    """The argument of `on_step`, which is called after an optimizer step."""

    number: int
    """Number of the step, from 1."""
    total: int
    """Number of steps of the run."""
    model: nn.Module
    """The stage, in training mode, with the weights after the step."""
    metrics: dict[str, float]
    """The metrics that the step logged, such as `loss` and `lr`; empty between logged steps (--log-every)."""


OnStep: TypeAlias = Callable[[Step], object]
"""Called after each optimizer step; an error in it ends the run just as an error in a step does."""
