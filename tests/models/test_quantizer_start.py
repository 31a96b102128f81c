"""The k-means start, and what goes before it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pecobook.models.quantizer import VectorQuantizer, kmeans
from tests.models.quantizing import clustered, latents, step


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
