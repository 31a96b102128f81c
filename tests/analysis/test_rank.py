"""The effective rank of features against closed forms and a slow version."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pecobook.analysis.rank import effective_rank


def test_effective_rank__counts_equally_strong_directions() -> None:
    directions = torch.linalg.qr(torch.randn(40, 12, generator=torch.Generator().manual_seed(0)))[0]
    assert effective_rank(directions) == pytest.approx(12, rel=1e-4)
    assert effective_rank(3 * directions) == pytest.approx(12, rel=1e-4)  # whatever their scale
    assert effective_rank(torch.cat([directions, torch.zeros(40, 5)], 1)) == pytest.approx(12, rel=1e-4)


def test_effective_rank__of_collapsed_features_is_one() -> None:
    assert effective_rank(torch.ones(30, 8) * torch.arange(1.0, 31)[:, None]) == pytest.approx(1, rel=1e-4)
    assert effective_rank(torch.zeros(30, 8)) == 0


def test_effective_rank__is_the_entropy_of_singular_values() -> None:
    features = np.random.default_rng(1).normal(size=(50, 7)) * [1, 2, 3, 4, 5, 6, 7]
    values = np.sqrt(np.linalg.eigvalsh(features.T @ features))  # another way to the singular values
    share = values / values.sum()
    expected = np.prod(share**-share)
    assert effective_rank(torch.from_numpy(features)) == pytest.approx(expected, rel=1e-4)
