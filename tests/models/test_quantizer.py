"""The quantizer: its averages against van den Oord's formulas and a peer library, revival, and checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pecobook.errors import ConfigError
from pecobook.models.quantizer import VectorQuantizer
from pecobook.settings.tokenizer import QuantizerConfig, VectorQuantizerConfig
from tests.models.quantizing import State, assert_same, latents, rows, state_of, step

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
    codewords = quantizer.lookup(codes)
    assert codewords.shape == (1, 4, 2, 3)
    assert torch.equal(codewords[0, :, 1, 2], quantizer.codebook[3])


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
    quantizer.load_state_dict(quantizer.state_dict())  # only the start counts so far
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
    state = quantizer.state_dict()
    state["codebook"][3], state["ema_sum"][3], state["ema_count"][3] = far, far, 1.0
    quantizer.load_state_dict(state)  # a codebook with counts is not initialised again
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


def test_init__takes_settings_by_name_or_as_one_object() -> None:
    named = VectorQuantizer(num_codewords=16, dim=4, decay=0.5, kind="gradient")
    whole = VectorQuantizer(QuantizerConfig(num_codewords=16, decay=0.5, kind="gradient"), 4)
    assert named.config == VectorQuantizerConfig(num_codewords=16, decay=0.5, kind="gradient")
    assert {k: v.shape for k, v in named.state_dict().items()} == {k: v.shape for k, v in whole.state_dict().items()}
    with pytest.raises(ConfigError, match=r"--decay must be at least 0 and below 1"):
        VectorQuantizer(16, 4, decay=2.0)
    with pytest.raises(ConfigError, match="--num-codewords takes a whole number, not 'a'"):
        VectorQuantizer("a", 4)  # type: ignore[arg-type]
    # This setting weighs the loss outside: here it would change nothing.
    with pytest.raises(ConfigError, match="Unknown setting 'commitment'"):
        VectorQuantizer(16, 4, commitment=0.5)
