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


class Hook:
    """Calls `on_step`, if there is one; an error in it ends the run as an error of a step does."""

    def __init__(self, on_step: OnStep | None) -> None:
        self.on_step = on_step
        self.logged: tuple[int, dict[str, float]] = (0, {})
        """The last step that was logged, and what it logged."""

    def after(self, step: int, total: int, model: nn.Module) -> None:
        """Tell of a step."""
        if self.on_step is not None:
            self.on_step(Step(step, total, model, self.logged[1] if self.logged[0] == step else {}))
