"""The codebook that learns by gradient, equation 3 as printed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.testing import assert_close

from pecobook.models.quantizer import VectorQuantizer
from tests.models.quantizing import assert_same, latents, rows, started, state_of, step


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
    quantizer = VectorQuantizer(16, 4, kind="gradient", start_after=1)
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
