"""The hook of a training: a function of the user's that is called after each optimizer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from torch import nn


class Step(NamedTuple):
    """What `on_step` is told after an optimizer step."""

    number: int
    """Number of the step, from 1."""
    total: int
    """Number of steps of the run."""
    model: nn.Module
    """The stage, in training mode, with the weights after the step."""
    metrics: dict[str, float]
    """What the step logged, such as `loss` and `lr`; empty for a step between logged ones (--log-every)."""


OnStep: TypeAlias = Callable[[Step], object]
"""Called after each optimizer step; an error in it ends the run as an error of a step does."""
