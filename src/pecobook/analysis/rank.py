"""Quality of features while they are learned: their effective rank and, with labels, probes."""

from __future__ import annotations

import torch
from torch import Tensor

from pecobook.analysis.probe import knn_probe, linear_probe


def effective_rank(features: Tensor) -> float:
    """Return RankMe of features (N, F): the exponential of the entropy of their singular values (arXiv 2210.02885).

    It lies between 1 (all features are multiples of one vector) and min(N, F) (all directions are equally strong); it
    is 0 if all features are zero.
    """
    values = torch.linalg.svdvals(features.double())
    total = values.sum()
    if total == 0:
        return 0.0
    share = values / total + 1e-7  # as in the paper, so that the logarithm is finite
    return float((-(share * share.log()).sum()).exp())


def feature_scores(train: tuple[Tensor, Tensor | None], test: tuple[Tensor, Tensor | None]) -> dict[str, float]:
    """Return `rank`, the effective rank of training features, and the accuracies `knn` and `linear` in percent.

    Args:
        train: features (N, F) and labels (N,) of training images; without labels (None) the accuracies are omitted.
        test: the same for held-out images.

    Returns:
        no scores if a feature is not finite, or if a part has no images.
    """
    (train_x, train_y), (test_x, test_y) = train, test
    if not (len(train_x) and len(test_x) and train_x.isfinite().all() and test_x.isfinite().all()):
        return {}
    scores = {"rank": effective_rank(train_x)}
    if train_y is not None and test_y is not None:
        data = train_x.numpy(), train_y.numpy(), test_x.numpy(), test_y.numpy()
        scores |= {"knn": knn_probe(*data).accuracy, "linear": linear_probe(*data).accuracy}
    return scores
