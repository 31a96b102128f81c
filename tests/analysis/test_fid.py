"""FID and the Inception score against closed forms, NumPy and SciPy, and torch-fidelity's own."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from pecobook.analysis.fid import FeatureSums, Gaussian, InceptionScore, frechet_distance


def features(count: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator)
    return torch.randn(count, dim, generator=generator) @ mix + 3 * torch.rand(dim, generator=generator)


def collected(values: Tensor, batch_size: int) -> Gaussian:
    sums = FeatureSums()
    for batch in torch.split(values, batch_size):
        sums.add(batch)
    return sums.gaussian()


def test_feature_sums__are_numpys_mean_and_covariance_whatever_the_batches() -> None:
    values = features(101, 7, 0) + 1000  # far from 0, where sums of squares would lose digits
    for batch_size in (1, 10, 101):
        gaussian = collected(values, batch_size)
        np.testing.assert_allclose(gaussian.mean, values.double().numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(gaussian.covariance, np.cov(values.double().numpy(), rowvar=False), rtol=1e-9)
        assert gaussian.num_images == 101
    with pytest.raises(ValueError, match="at least two images, not 1"):
        collected(values[:1], 1).covariance.sum()


@pytest.mark.parametrize("count", [200, 5])  # with 5 images of 6 features the covariance is singular
def test_frechet_distance__is_scipys(count: int) -> None:
    pytest.importorskip("torch_fidelity")
    one, other = collected(features(count, 6, 1), 16), collected(features(300, 6, 2), 16)
    root = scipy.linalg.sqrtm(one.covariance @ other.covariance).real
    expected = np.square(one.mean - other.mean).sum() + np.trace(one.covariance + other.covariance - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-5 * np.trace(one.covariance))


def test_frechet_distance__of_gaussians_with_equal_axes_is_the_closed_form() -> None:
    pytest.importorskip("torch_fidelity")
    one = Gaussian(np.array([0.0, 0.0]), np.diag([1.0, 4.0]), 0)
    other = Gaussian(np.array([3.0, 4.0]), np.diag([9.0, 1.0]), 0)
    assert frechet_distance(one, other) == pytest.approx(25 + (1 - 3) ** 2 + (2 - 1) ** 2)


@pytest.mark.parametrize("count", [10, 57])
def test_inception_score__is_torch_fidelitys_and_numpys(count: int) -> None:
    metric = pytest.importorskip("torch_fidelity.metric_isc")
    logits = 3 * torch.randn(count, 11, generator=torch.Generator().manual_seed(4))
    score = InceptionScore(count)
    for places in torch.split(torch.arange(count), 8):
        score.add(logits[places], places)
    theirs = metric.isc_features_to_metric(logits)
    assert score.result() == pytest.approx((theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-9)
    order = np.random.RandomState(2020).permutation(count)
    p = np.exp(logits.double().numpy()[order])
    p /= p.sum(1, keepdims=True)
    chunks = [p[i * count // 10 : (i + 1) * count // 10] for i in range(10)]
    values = [np.exp((chunk * np.log(chunk / chunk.mean(0))).sum(1).mean()) for chunk in chunks]
    assert score.result() == pytest.approx((np.mean(values), np.std(values)), rel=1e-9)


def test_inception_score__of_images_that_are_alike_is_one() -> None:
    score = InceptionScore(40)
    score.add(torch.ones(30, 5), torch.arange(30))  # ten could not be read
    assert score.result() == pytest.approx((1.0, 0.0))
