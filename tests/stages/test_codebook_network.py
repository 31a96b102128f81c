"""The perceptual network of a codebook: a run of pecobook, and what its features keep and compute in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runs import inputs, logged, train
from tests.stages.test_codebook import NETWORK, batch, make


@pytest.mark.parametrize(("command", "layers"), [("contrast", (3, 4)), ("pretrain", (1, 2))])
def test_train__a_pecobook_run_is_the_perceptual_network(
    command: str, layers: tuple[int, ...], images: Path, codebook_run: Path, tmp_path: Path
) -> None:
    network = train(command, images, tmp_path / "network", **inputs(command, codebook_run, codebook_run))
    run = train(
        "codebook",
        images,
        tmp_path / "run",
        **{"perceptual.network": str(network), "perceptual.layers": layers, "max_steps": "3"},
    )
    assert logged(run)[-1]["perceptual"] > 0
    assert logged(run)[-1]["evaluation/perceptual"] > 0


class _Watched:
    """`features` of a frozen network, with what each call computes in and what it keeps for a backward pass."""

    def __init__(self, network: Any, name: str = "features") -> None:
        self.original, self.calls = getattr(network, name), list[tuple[int, torch.dtype]]()
        self.types: list[torch.dtype] = []
        setattr(network, name, self)
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda _module, _inputs, output: self.types.append(output.dtype))

    def __call__(self, *args: Any) -> Any:
        kept: list[Tensor] = []
        self.types.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
            found = self.original(*args)
        assert len(set(self.types)) == 1
        self.calls.append((len(kept), self.types[0]))
        return found


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_forward__the_features_of_the_images_keep_nothing_and_have_the_precision_of_the_run(
    precision: str, dtype: torch.dtype
) -> None:
    stage = make(perceptual=NETWORK)
    stage(batch())  # starts the codebook
    watched = _Watched(stage.perceptual)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = stage(batch()).loss
    loss.backward()
    (of_images, first), (of_restored, second) = watched.calls
    assert of_images == 0
    assert of_restored > 10
    assert first == second == dtype
