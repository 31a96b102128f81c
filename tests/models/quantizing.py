"""Vectors, steps and states for the tests of the quantizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pecobook.models.quantizer import VectorQuantizer

State = dict[str, Tensor]


def latents(batch: int, dim: int, side: int, seed: int) -> Tensor:
    return torch.randn(batch, dim, side, side, generator=torch.Generator().manual_seed(seed))


def rows(z: Tensor) -> Tensor:
    """(B, D, h, w) to (B h w, D)."""
    return z.permute(0, 2, 3, 1).flatten(0, 2)


def state_of(quantizer: VectorQuantizer) -> State:
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def assert_same(first: State, second: State) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def step(quantizer: VectorQuantizer, *batches: Tensor) -> None:
    for z in batches:
        quantizer(z)
    quantizer.update()


def clustered(number: int, dim: int, per_cluster: int, seed: int = 0) -> Tensor:
    """Vectors (number x per_cluster, D) around centres far apart, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    centres = 100 * torch.randn(number, dim, generator=generator)
    noisy = centres.repeat(per_cluster, 1) + 0.01 * torch.randn(number * per_cluster, dim, generator=generator)
    return noisy[torch.randperm(len(noisy), generator=generator)]


def started(kind: str, **more: Any) -> VectorQuantizer:
    quantizer = VectorQuantizer(16, 4, kind=kind, **more)
    quantizer(latents(4, 4, 4, 0))
    quantizer.update()
    return quantizer
