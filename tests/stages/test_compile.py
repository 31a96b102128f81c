"""A compiled stage is compiled once: values that change from step to step must not be constants of its graphs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from pecobook.engine import loop
from tests.runs import train

STEPS = 8
NETWORK = {"perceptual.network": "timm:resnet10t", "perceptual.weights": "random", "perceptual.layers": (1, 2)}
ADVERSARIAL = {"quantizer.kind": "gradient", "adversarial.weight": 0.4, "adversarial.num_layers": 1}


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Return a list of the number of graphs compiled by the end of each step; the backend runs graphs uncompiled."""
    compile_module, step = nn.Module.compile, loop.Loop.step_once
    num_graphs: list[int] = []

    def count(self: loop.Loop, *arguments: Any) -> bool:
        stop = step(self, *arguments)
        num_graphs.append(counters["stats"]["unique_graphs"])
        return stop

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile_module(self, backend="eager"))
    monkeypatch.setattr(loop.Loop, "step_once", count)
    yield num_graphs
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("codebook", {**NETWORK, "perceptual.warmup": 5, "quantizer.start_after": 3}),
        ("pretrain", {}),
        ("finetune", {}),
        pytest.param("codebook", ADVERSARIAL, marks=pytest.mark.slow),
        pytest.param("codebook", {"micro_batch_size": 4}, marks=pytest.mark.slow),
        pytest.param("contrast", {}, marks=pytest.mark.slow),
        pytest.param("contrast", {"micro_batch_size": 2}, marks=pytest.mark.slow),
        pytest.param("segment", {}, marks=pytest.mark.slow),
    ],
)
def test_train__is_not_compiled_again_at_later_steps(
    command: str, more: dict[str, Any], images: Path, needs: dict[str, str], tmp_path: Path, compilations: list[int]
) -> None:
    if command == "contrast" and more and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        pytest.skip("old versions of PyTorch compile it again at a few steps, which costs time alone")
    settings = {"data": str(images), **needs, **more}
    train(command, settings.pop("data"), tmp_path / "run", **settings, compile=True, max_steps=str(STEPS))
    assert compilations[0] > 0
    # The codebook's start, at the fourth step at the latest, makes new graphs; the last step evaluates.
    assert compilations[4] == compilations[STEPS - 2]
