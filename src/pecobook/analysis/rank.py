"""Effective rank of features: how many directions a representation uses, without labels."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(features: Tensor) -> float:
    """Return RankMe of features (N, F): the exponential of the entropy of their singular values (arXiv 2210.02885).

    It lies between 1, where all features are multiples of one vector, and min(N, F), where all directions are equally
    strong; features that are all zero have 0.
    """
    values = torch.linalg.svdvals(features.double())
    total = values.sum()
    if total == 0:
        return 0.0
    share = values / total + 1e-7  # as in the paper, so that the logarithm is finite
    return float((-(share * share.log()).sum()).exp())
