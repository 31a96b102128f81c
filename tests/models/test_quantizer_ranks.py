"""Two ranks against one: start, averages, revival and gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from pecobook.models.quantizer import VectorQuantizer
from tests.distributed import TwoProcesses
from tests.models.quantizing import State, assert_same, clustered, latents, state_of


def run_rank(rank: int, world_size: int, batches: list[Tensor], options: dict[str, Any]) -> tuple[list[Tensor], State]:
    """Codes of every step, and the state at the end, of a rank that holds its share of each batch."""
    quantizer = VectorQuantizer(**options)
    codes = []
    for z in batches:
        share = len(z) // world_size
        codes.append(quantizer(z[rank * share : (rank + 1) * share]).codes)
        quantizer.update()
    return codes, state_of(quantizer)


def drifting(steps: int, batch: int, dim: int, side: int) -> list[Tensor]:
    """Batches whose mean moves, so that codewords die."""
    return [latents(batch, dim, side, seed) + 0.5 * torch.sin(torch.tensor(seed / 8.0)) * 8 for seed in range(steps)]


def test_two_processes__half_batches_are_one_whole(two_processes: TwoProcesses) -> None:
    batches = [latents(8, 4, 4, seed) for seed in range(12)]
    options = {"num_codewords": 16, "dim": 4, "revive_after": 100}
    codes, state = run_rank(0, 1, batches, options)
    (left, left_state), (right, right_state) = two_processes.run(run_rank, batches, options)
    for whole, first, second in zip(codes, left, right, strict=True):
        assert torch.equal(whole, torch.cat([first, second]))
    assert_same(left_state, right_state)
    for name in ("codebook", "ema_count", "ema_sum"):
        assert_close(left_state[name], state[name], atol=1e-6, rtol=1e-6)


def test_two_processes__revive_the_same_as_one(two_processes: TwoProcesses) -> None:
    batches = drifting(41, 8, 4, 4)
    options = {"num_codewords": 16, "dim": 4, "revive_after": 4}
    _, state = run_rank(0, 1, batches, options)
    (_, left), (_, right) = two_processes.run(run_rank, batches, options)
    assert state["num_revived"] > 5
    assert torch.equal(left["num_revived"], state["num_revived"])
    assert_same(left, right)
    assert_close(left["codebook"], state["codebook"], atol=1e-5, rtol=1e-5)


def test_two_processes__codebooks_stay_equal_for_200_steps(two_processes: TwoProcesses) -> None:
    batches = drifting(200, 4, 4, 4)
    options = {"num_codewords": 32, "dim": 4, "revive_after": 5}
    (_, left), (_, right) = two_processes.run(run_rank, batches, options)
    assert left["num_revived"] > 50
    assert left["num_updates"] == 200
    assert_same(left, right)


def test_two_processes__kmeans_starts_from_all_vectors(two_processes: TwoProcesses) -> None:
    # Each rank alone sees half of the clusters.
    vectors = clustered(16, 4, per_cluster=16)
    order = vectors[:, 0].argsort()
    z = vectors[order].view(8, 32, 1, 4).permute(0, 3, 1, 2).contiguous()
    options = {"num_codewords": 16, "dim": 4}
    (left_codes, left), (right_codes, right) = two_processes.run(run_rank, [z], options)
    _, whole = run_rank(0, 1, [z], options)
    assert_same(left, right)
    assert_close(left["codebook"], whole["codebook"], atol=1e-4, rtol=1e-5)
    assert len(torch.unique(torch.cat([left_codes[0], right_codes[0]]))) == 16


def accumulate_rank(rank: int, world_size: int, batches: list[Tensor], parts: int) -> State:
    quantizer = VectorQuantizer(16, 4, revive_after=0)
    for z in batches:
        for micro_batch in z.chunk(world_size)[rank].chunk(parts):  # k-means starts from all vectors in one order
            quantizer(micro_batch)
        quantizer.update()
    return state_of(quantizer)


def test_two_processes__accumulation_changes_only_rounding(two_processes: TwoProcesses) -> None:
    batches = [latents(8, 4, 4, seed) for seed in range(8)]
    left, right = two_processes.run(accumulate_rank, batches, 4)
    whole = accumulate_rank(0, 1, batches, 1)
    assert_same(left, right)
    for name in whole:
        assert_close(left[name], whole[name], atol=1e-5, rtol=1e-5)


def test_update__starts_from_all_micro_batches() -> None:
    whole, parts = VectorQuantizer(16, 4), VectorQuantizer(16, 4)
    for seed in range(3):
        z = latents(8, 4, 4, seed)
        whole(z)
        for micro_batch in z.chunk(4):
            parts(micro_batch)
        whole.update()
        parts.update()
    assert_same(state_of(whole), state_of(parts))


def gradient_rank(rank: int, world_size: int, z: Tensor) -> Tensor:
    """Gradient of the commitment loss with respect to a weight before the quantizer, averaged as DDP does."""
    import torch.distributed as dist

    weight = torch.eye(4).requires_grad_()
    quantizer = VectorQuantizer(16, 4)
    part = z.chunk(world_size)[rank]
    out = quantizer(torch.einsum("ij,bjhw->bihw", weight, part))
    (out.commitment_loss + F.mse_loss(out.quantized, torch.zeros_like(out.quantized))).backward()
    assert weight.grad is not None
    if world_size > 1:
        dist.all_reduce(weight.grad)
    return weight.grad / world_size


def test_two_processes__gradients_are_those_of_one(two_processes: TwoProcesses) -> None:
    z = latents(8, 4, 4, 0)
    left, right = two_processes.run(gradient_rank, z)
    assert torch.equal(left, right)
    assert_close(left, gradient_rank(0, 1, z))
