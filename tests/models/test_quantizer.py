"""The quantizer: its averages against van den Oord's formulas, and two ranks against one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from pecobook.models.quantizer import VectorQuantizer, kmeans
from tests.distributed import TwoProcesses

State = dict[str, Tensor]


def latents(batch: int, dim: int, side: int, seed: int) -> Tensor:
    return torch.randn(batch, dim, side, side, generator=torch.Generator().manual_seed(seed))


def rows(z: Tensor) -> Tensor:
    """(B, D, h, w) to (B h w, D)."""
    return z.permute(0, 2, 3, 1).flatten(0, 2)


def state_of(quantizer: VectorQuantizer) -> State:
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def assert_same(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


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


# ------------------------------------------------------------------------------------------------------------ forward


def test_forward__is_the_nearest_codeword_with_a_straight_through_gradient() -> None:
    quantizer = VectorQuantizer(16, 4).eval()
    z = latents(2, 4, 5, 0).requires_grad_()
    out = quantizer(z)
    distances = torch.cdist(rows(z), quantizer.codebook)
    assert torch.equal(out.codes.flatten(), distances.argmin(1))
    assert out.codes.shape == (2, 5, 5)
    assert out.codes.dtype == torch.int64
    assert_close(rows(out.quantized), quantizer.codebook[out.codes.flatten()])
    assert_close(out.commitment_loss, distances.min(1).values.square().mean() / 4)
    upstream = torch.randn(z.shape)
    (gradient,) = torch.autograd.grad(out.quantized, z, upstream, retain_graph=True)
    assert torch.equal(gradient, upstream)
    (gradient,) = torch.autograd.grad(out.commitment_loss, z)
    assert_close(gradient, 2 * (z - out.quantized).detach() / z.numel())


def test_forward__gives_the_codebook_no_gradient_and_the_optimizer_no_parameter() -> None:
    quantizer = VectorQuantizer(16, 4)
    out = quantizer(latents(1, 4, 4, 0).requires_grad_())
    (out.quantized.sum() + out.commitment_loss).backward()
    assert list(quantizer.parameters()) == []
    assert quantizer.codebook.grad is None
    assert not quantizer.codebook.requires_grad


def test_forward__of_a_rectangle_keeps_rows_and_columns() -> None:
    quantizer = VectorQuantizer(8, 3).eval()
    z = quantizer.codebook[torch.arange(6) + 1].T.reshape(1, 3, 2, 3).clone()
    assert quantizer(z).codes.tolist() == [[[1, 2, 3], [4, 5, 6]]]
    assert_close(quantizer(z).quantized, z)


def test_forward__is_single_precision_under_autocast() -> None:
    plain, cast = VectorQuantizer(32, 4, seed=1), VectorQuantizer(32, 4, seed=1)
    cast.load_state_dict(plain.state_dict())
    for seed in range(3):
        z = latents(2, 4, 8, seed)
        expected = plain(z)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = cast(z)
            cast.update()
        plain.update()
        assert out.quantized.dtype == out.commitment_loss.dtype == torch.float32
        assert torch.equal(out.quantized, expected.quantized)
        assert torch.equal(out.commitment_loss, expected.commitment_loss)
    assert_same(state_of(plain), state_of(cast))
    assert cast(latents(2, 4, 8, 9).bfloat16()).quantized.dtype == torch.float32
    assert all(value.dtype in (torch.float32, torch.int64) for value in cast.state_dict().values())


def test_forward__in_evaluation_changes_nothing_even_if_never_started() -> None:
    quantizer = VectorQuantizer(16, 4).eval()
    before = state_of(quantizer)
    codes = quantizer(latents(4, 4, 4, 0)).codes
    quantizer.update()
    assert_same(before, state_of(quantizer))
    assert codes.min() >= 0
    assert codes.max() < 16
    assert len(torch.unique(codes)) > 1


def test_lookup__gives_codewords() -> None:
    quantizer = VectorQuantizer(9, 4)
    codes = torch.tensor([[[0, 1, 2], [8, 8, 3]]])
    found = quantizer.lookup(codes)
    assert found.shape == (1, 4, 2, 3)
    assert torch.equal(found[0, :, 1, 2], quantizer.codebook[3])


# ------------------------------------------------------------------------------------------------------------- update


class SlowAverages:
    """Van den Oord et al. (arXiv 1711.00937, appendix A.1), vector by vector, in double precision.

    N_i <- g N_i + (1 - g) n_i;  m_i <- g m_i + (1 - g) sum_j z_ij;  e_i <- m_i / N_i, with N_i smoothed by Laplace's
    rule: (N_i + eps) / (sum_k N_k + K eps) sum_k N_k.
    """

    def __init__(self, state: State, decay: float, eps: float) -> None:
        self.e, self.m = (state[name].double().numpy().copy() for name in ("codebook", "ema_sum"))
        self.N = state["ema_count"].double().numpy().copy()
        self.decay, self.eps = decay, eps

    def update(self, z: Tensor) -> None:
        K = len(self.e)
        n, sums = np.zeros(K), np.zeros_like(self.e)
        for vector in rows(z).double().numpy():
            i = min(range(K), key=lambda i: float(((vector - self.e[i]) ** 2).sum()))
            n[i] += 1
            sums[i] += vector
        for i in range(K):
            self.N[i] = self.decay * self.N[i] + (1 - self.decay) * n[i]
            self.m[i] = self.decay * self.m[i] + (1 - self.decay) * sums[i]
        total = self.N.sum()
        for i in (int(i) for i in np.flatnonzero(n)):  # ours: a codeword that nothing chose keeps its place
            self.e[i] = self.m[i] / ((self.N[i] + self.eps) / (total + K * self.eps) * total)


@pytest.mark.parametrize(("decay", "eps"), [(0.99, 1e-5), (0.8, 1e-2)])
def test_update__is_van_den_oords(decay: float, eps: float) -> None:
    quantizer = VectorQuantizer(12, 3, decay=decay, eps=eps, revive_after=0)
    quantizer(latents(2, 3, 6, 0))
    quantizer._pending = None  # only the start counts so far
    slow = SlowAverages(state_of(quantizer), decay, eps)
    for seed in range(1, 9):
        z = latents(2, 3, 6, seed)
        step(quantizer, z)
        slow.update(z)
        assert_close(quantizer.codebook.double(), torch.from_numpy(slow.e), atol=1e-5, rtol=1e-5)
    assert_close(quantizer.ema_count.double(), torch.from_numpy(slow.N), atol=1e-4, rtol=1e-5)
    assert_close(quantizer.ema_sum.double(), torch.from_numpy(slow.m), atol=1e-4, rtol=1e-5)
    assert quantizer.num_updates == 8


def test_update__takes_two_half_batches_as_one_whole() -> None:
    whole, halves = VectorQuantizer(24, 4, revive_after=0), VectorQuantizer(24, 4, revive_after=0)
    start = latents(8, 4, 4, 0)
    step(whole, start)
    step(halves, start)
    for seed in range(1, 12):
        z = latents(8, 4, 4, seed)
        step(whole, z)
        step(halves, z[:4], z[4:])
    assert_close(whole.codebook, halves.codebook, atol=1e-6, rtol=1e-6)
    assert_close(whole.ema_count, halves.ema_count, atol=1e-5, rtol=1e-6)
    assert torch.equal(whole.idle, halves.idle)


def test_update__without_a_forward_does_nothing() -> None:
    quantizer = VectorQuantizer(8, 2)
    step(quantizer, latents(2, 2, 4, 0))
    before = state_of(quantizer)
    quantizer.update()
    assert_same(before, state_of(quantizer))


def test_update__keeps_a_codeword_that_was_never_chosen() -> None:
    quantizer = VectorQuantizer(4, 2, revive_after=0)
    far = torch.tensor([1000.0, 1000.0])
    with torch.no_grad():
        quantizer.codebook[3] = far
    quantizer._started = True
    for seed in range(20):
        step(quantizer, latents(2, 2, 4, seed))
    assert torch.equal(quantizer.codebook[3], far)
    assert quantizer.idle[3] == 20
    assert quantizer.codebook.isfinite().all()


def test_update__counts_idle_updates() -> None:
    quantizer = VectorQuantizer(2, 1, revive_after=0)
    quantizer(torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2))
    quantizer.update()
    assert quantizer.idle.tolist() == [0, 0]
    low = int(quantizer.codebook.argmin())
    for _ in range(3):
        step(quantizer, torch.tensor([-1.0]).view(1, 1, 1, 1))
    assert quantizer.idle[low] == 0
    assert quantizer.idle[1 - low] == 3


# ------------------------------------------------------------------------------------------------------------ revival


def dead_one(revive_after: int) -> VectorQuantizer:
    """Eight codewords, the last of them far from all data."""
    quantizer = VectorQuantizer(8, 2, revive_after=revive_after)
    step(quantizer, latents(4, 2, 4, 0))
    with torch.no_grad():
        quantizer.codebook[7] = 1000.0
        quantizer.ema_sum[7] = 1000.0 * quantizer.ema_count[7]
    return quantizer


def test_revive__replaces_a_dead_codeword_with_its_statistics() -> None:
    quantizer = dead_one(revive_after=5)
    for seed in range(1, 9):  # nine updates with the first
        step(quantizer, latents(4, 2, 4, seed))
    assert quantizer.num_revived == 0
    assert_close(quantizer.codebook[7], torch.full((2,), 1000.0))
    z = latents(4, 2, 4, 9)
    step(quantizer, z)
    assert quantizer.num_revived == 1
    assert quantizer.idle[7] == 0
    assert (rows(z) == quantizer.codebook[7]).all(1).any()
    assert_close(quantizer.ema_sum[7], quantizer.codebook[7] * quantizer.ema_count[7])
    # Its count is what an average codeword had before, so that it neither jumps nor is stuck.
    assert quantizer.ema_count[7] == pytest.approx(64 / 8, rel=0.05)
    # The next update does not pull it back, whether a vector chooses it or not.
    revived = quantizer.codebook[7].clone()
    step(quantizer, latents(4, 2, 4, 10))
    assert (quantizer.codebook[7] - revived).norm() < 0.1
    step(quantizer, 1000 + latents(4, 2, 4, 10))  # chosen by none or few
    assert quantizer.codebook[7].abs().max() < 50


def test_revive__never_when_switched_off() -> None:
    quantizer = dead_one(revive_after=0)
    for seed in range(1, 40):
        step(quantizer, latents(4, 2, 4, seed))
    assert quantizer.num_revived == 0
    assert_close(quantizer.codebook[7], torch.full((2,), 1000.0), atol=5, rtol=0)


def test_revive__takes_different_vectors_for_different_codewords() -> None:
    quantizer = VectorQuantizer(8, 2, revive_after=5)
    step(quantizer, latents(4, 2, 4, 0))
    with torch.no_grad():
        quantizer.codebook[4:] = 1000 + torch.arange(4.0)[:, None]
        quantizer.ema_sum[4:] = quantizer.codebook[4:] * quantizer.ema_count[4:, None]
    for seed in range(1, 10):
        step(quantizer, latents(4, 2, 4, seed))
    assert quantizer.num_revived == 4
    assert len(torch.unique(quantizer.codebook, dim=0)) == 8


def test_revive__ends_a_collapse() -> None:
    # The data moves away from where the codebook started: one codeword takes all until the others are revived.
    quantizer = VectorQuantizer(32, 4, revive_after=20)
    step(quantizer, latents(4, 4, 8, 0))
    used = []
    for seed in range(1, 200):
        z = latents(4, 4, 8, seed) + 30
        quantizer(z)
        quantizer.update()
        used.append(len(torch.unique(quantizer.eval()(z).codes)))
        quantizer.train()
    assert used[0] < 8
    assert used[-1] > 28


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_state_dict__a_resumed_quantizer_goes_on_bit_for_bit() -> None:
    def run(quantizer: VectorQuantizer, seeds: range) -> None:
        for seed in seeds:
            step(quantizer, latents(2, 4, 4, seed) + seed, latents(2, 4, 4, 100 + seed))

    whole = VectorQuantizer(16, 4, revive_after=3)
    run(whole, range(25))
    first = VectorQuantizer(16, 4, revive_after=3)
    run(first, range(15))
    resumed = VectorQuantizer(16, 4, revive_after=3)
    resumed(latents(2, 4, 4, 77))  # whatever it held is forgotten
    resumed.load_state_dict(state_of(first))
    run(resumed, range(15, 25))
    assert whole.num_revived > 0
    assert_same(state_of(whole), state_of(resumed))


def test_state_dict__ten_updates_are_five_and_five() -> None:
    whole, first, second = (VectorQuantizer(16, 4) for _ in range(3))
    for seed in range(10):
        step(whole, latents(2, 4, 4, seed))
    for seed in range(5):
        step(first, latents(2, 4, 4, seed))
    second.load_state_dict(state_of(first))
    for seed in range(5, 10):
        step(second, latents(2, 4, 4, seed))
    assert_same(state_of(whole), state_of(second))


def test_state_dict__before_the_start_starts_later() -> None:
    quantizer = VectorQuantizer(4, 2)
    nn.Sequential(quantizer).load_state_dict({f"0.{k}": v for k, v in VectorQuantizer(4, 2).state_dict().items()})
    z = latents(2, 2, 4, 0) + 50
    quantizer(z)
    assert quantizer.codebook.min() > 40


# ------------------------------------------------------------------------------------------------------ k-means start


def test_start__uses_every_codeword_on_separate_clusters() -> None:
    vectors = clustered(16, 8, per_cluster=16)
    quantizer = VectorQuantizer(16, 8)
    z = vectors.view(4, 8, 8, 8).permute(0, 3, 1, 2)
    codes = quantizer(z).codes
    assert len(torch.unique(codes)) == 16
    assert quantizer.ema_count.sum() == 256
    assert_close(quantizer.ema_sum, quantizer.codebook * quantizer.ema_count[:, None])


def test_start__scales_the_counts_to_the_whole_batch() -> None:
    quantizer = VectorQuantizer(4, 2)
    quantizer(latents(10, 2, 16, 0))  # 2,560 vectors, of which every 20th tells the centres
    assert quantizer.ema_count.sum() == pytest.approx(2560)


def test_start__with_fewer_vectors_than_codewords() -> None:
    quantizer = VectorQuantizer(64, 3)
    z = latents(1, 3, 3, 0)
    out = quantizer(z)
    assert quantizer.codebook.isfinite().all()
    assert len(torch.unique(quantizer.codebook, dim=0)) == 64
    assert len(torch.unique(out.codes)) == 9
    assert (out.quantized - z).abs().max() < 0.2
    step(quantizer, z)
    assert quantizer.codebook.isfinite().all()


def test_start__with_one_vector() -> None:
    quantizer = VectorQuantizer(4, 2)
    step(quantizer, torch.full((1, 2, 1, 1), 3.0))
    assert_close(quantizer.codebook, torch.full((4, 2), 3.0), atol=0.2, rtol=0)


def test_kmeans__is_lloyds_algorithm() -> None:
    vectors = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    first, _ = kmeans(vectors, 5, seed=2, iterations=0)
    centres, counts = kmeans(vectors, 5, seed=2, iterations=4)
    slow = first.double().numpy()
    assert all((vectors.numpy() == row).all(1).any() for row in first.numpy())
    for _ in range(4):
        nearest = np.array([np.argmin(((v - slow) ** 2).sum(1)) for v in vectors.double().numpy()])
        slow = np.stack([vectors.double().numpy()[nearest == i].mean(0) for i in range(5)])
    assert_close(centres.double(), torch.from_numpy(slow), atol=1e-5, rtol=1e-5)
    assert counts.tolist() == np.bincount(nearest, minlength=5).tolist()
    again, _ = kmeans(vectors, 5, seed=2, iterations=4)
    other, _ = kmeans(vectors, 5, seed=3, iterations=4)
    assert torch.equal(again, centres)
    assert not torch.equal(other, centres)


def test_kmeans__moves_an_empty_cluster() -> None:
    vectors = torch.tensor([[0.0], [0.0], [0.0], [0.0], [0.0], [0.0], [0.0], [5.0], [9.0]])
    centres, _ = kmeans(vectors, 3, seed=0, iterations=50)
    assert sorted(centres.flatten().tolist()) == [0.0, 5.0, 9.0]


# ------------------------------------------------------------------------------------------------------ two processes


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
    for number, z in enumerate(batches):
        micro = [z] if number == 0 else list(z.chunk(parts))  # the start sees the first micro-batch only
        for one in micro:
            quantizer(one.chunk(world_size)[rank])
        quantizer.update()
    return state_of(quantizer)


def test_two_processes__accumulation_changes_only_rounding(two_processes: TwoProcesses) -> None:
    batches = [latents(8, 4, 4, seed) for seed in range(8)]
    left, right = two_processes.run(accumulate_rank, batches, 4)
    whole = accumulate_rank(0, 1, batches, 1)
    assert_same(left, right)
    for name in whole:
        assert_close(left[name], whole[name], atol=1e-5, rtol=1e-5)


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


def test_forward__passes_vectors_unquantised_until_the_start() -> None:
    quantizer = VectorQuantizer(12, 3, start_after=2)
    for number in range(2):
        z = latents(2, 3, 6, number)
        out = quantizer(z)
        assert torch.equal(out.quantized, z)
        assert out.commitment_loss == 0
        quantizer.update()
        assert not quantizer.ema_count.any()  # nothing learned yet
    again = VectorQuantizer(12, 3, start_after=2)
    again.load_state_dict(quantizer.state_dict())  # the count of steps is part of the state
    z = latents(2, 3, 6, 2)
    out, same = quantizer(z), again(z)
    assert not torch.equal(out.quantized, z)
    assert out.codes.unique().numel() == 12
    assert torch.equal(out.codes, same.codes)
    assert torch.equal(quantizer.codebook, again.codebook)


# ------------------------------------------------------------------------------------- equation 3 as printed


def started(learning: str, **more: Any) -> VectorQuantizer:
    quantizer = VectorQuantizer(16, 4, learning=learning, **more)  # type: ignore[arg-type]
    quantizer(latents(4, 4, 4, 0))
    quantizer.update()
    return quantizer


def test_gradient__moves_codewords_by_the_middle_term() -> None:
    quantizer, z = started("gradient"), latents(4, 4, 4, 1).requires_grad_()
    assert [name for name, _ in quantizer.named_parameters()] == ["codebook"]
    out = quantizer(z)
    assert_close(out.codebook_loss, out.commitment_loss)
    gradients: Any = torch.autograd.grad(out.codebook_loss, [quantizer.codebook, z], allow_unused=True)
    to_codebook, to_z = gradients
    assert to_z is None
    slow = np.zeros((16, 4))
    book = quantizer.codebook.detach().double().numpy()
    vectors = rows(z.detach()).double().numpy()
    for vector, code in zip(vectors, out.codes.flatten().tolist(), strict=True):
        slow[code] += 2 * (book[code] - vector) / vectors.size
    assert_close(to_codebook.double(), torch.from_numpy(slow), rtol=1e-4, atol=1e-6)
    out = quantizer(z)
    rest = out.commitment_loss + out.quantized.sum()
    gradients = torch.autograd.grad(rest, [quantizer.codebook], allow_unused=True)
    assert gradients == (None,)  # sg[z_q], and straight-through


def test_gradient__update_counts_and_revives_and_moves_nothing_else() -> None:
    quantizer = started("gradient", revive_after=5)
    with torch.no_grad():
        quantizer.codebook[7] = 1000.0
    before = quantizer.codebook.detach().clone()
    for seed in range(1, 9):
        step(quantizer, latents(4, 4, 4, seed))
        assert torch.equal(quantizer.codebook, before)
    z = latents(4, 4, 4, 9)
    step(quantizer, z)
    assert quantizer.num_revived >= 1
    assert (rows(z) == quantizer.codebook[7]).all(1).any()


def test_gradient__before_the_start_every_parameter_takes_part() -> None:
    quantizer = VectorQuantizer(16, 4, learning="gradient", start_after=1)
    quantizer(latents(2, 4, 4, 0)).codebook_loss.backward()
    assert quantizer.codebook.grad is not None
    assert not quantizer.codebook.grad.any()


def test_averages__give_the_codebook_loss_no_gradient() -> None:
    out = started("ema")(latents(4, 4, 4, 1).requires_grad_())
    assert not out.codebook_loss.requires_grad
    assert torch.equal(out.codebook_loss, out.commitment_loss.detach())


def test_nearest__is_the_codeword_without_learning() -> None:
    quantizer = started("ema")
    z = latents(2, 4, 4, 3)
    before = state_of(quantizer)
    assert_close(quantizer.nearest(z), quantizer.eval()(z).quantized)
    quantizer.train().update()
    assert_same(before, state_of(quantizer))
    waiting = VectorQuantizer(16, 4, start_after=3)
    assert torch.equal(waiting.nearest(z), z)


# ----------------------------------------------------------------------------------------- beside a peer library


@pytest.mark.parametrize("decay", [0.8, 0.99])
def test_update__is_that_of_vector_quantize_pytorch(decay: float) -> None:
    """The same codebook, batches and averages through a well-known implementation, without revival on either side."""
    from vector_quantize_pytorch import VectorQuantize

    ours = VectorQuantizer(24, 4, decay=decay, eps=1e-5, revive_after=0)
    step(ours, latents(8, 4, 4, 0))
    theirs = VectorQuantize(dim=4, codebook_size=24, decay=decay, eps=1e-5, commitment_weight=1.0).train()
    book = theirs._codebook
    book.embed.data.copy_(ours.codebook[None])
    book.embed_avg.data.copy_(ours.ema_sum[None])
    book.cluster_size.data.copy_(ours.ema_count[None])
    book.initted.fill_(True)
    for seed in range(1, 6):
        z = latents(8, 4, 4, seed)
        out = ours(z)
        ours.update()
        quantized, codes, loss = theirs(rows(z)[None])
        assert torch.equal(out.codes.flatten(), codes[0])
        assert_close(rows(out.quantized), quantized[0])
        assert_close(out.commitment_loss, loss.squeeze())
        # A codeword that nothing chose stays where it is with us; theirs is smoothed towards the origin.
        used = torch.bincount(codes[0], minlength=24) > 0
        assert int(used.sum()) > 16
        assert_close(ours.codebook[used], book.embed[0][used], atol=1e-5, rtol=1e-5)
        assert_close(ours.ema_count, book.cluster_size[0], atol=1e-4, rtol=1e-5)
        assert_close(ours.ema_sum, book.embed_avg[0], atol=1e-4, rtol=1e-5)
        book.embed.data.copy_(ours.codebook[None])
