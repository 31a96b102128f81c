"""FID and the Inception score, from sums that are collected batch by batch.

torch-fidelity computes the distance; the sums here replace its arrays of all images' features, so that memory does not
grow with the number of images.

B images per batch, F features, C classes, S splits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pecobook.utils.devices import widest


class Gaussian(NamedTuple):
    """Mean and covariance of image features."""

    mean: NDArray[np.float64]
    """(F,)."""
    covariance: NDArray[np.float64]
    """(F, F), with the divisor N - 1."""
    num_images: int
    """N; 0 if unknown."""


class FeatureSums:
    """Sums of features and of their products, fp64 on the device of the features."""

    def __init__(self) -> None:
        self.count = 0
        self._shift = self._sum = self._products = torch.zeros(0)

    def add(self, features: Tensor) -> None:
        """Add the features of a batch, (B, F)."""
        features = widest(features)
        if not self.count:
            self._shift = features.mean(0)  # near the mean, so that the products lose no digits
            self._sum = torch.zeros_like(self._shift)
            self._products = features.new_zeros(len(self._shift), len(self._shift))
        shifted = features - self._shift
        self._sum += shifted.sum(0)
        self._products.addmm_(shifted.T, shifted)
        self.count += len(features)

    def gaussian(self) -> Gaussian:
        """Return mean and covariance. Raises ValueError for fewer than two images."""
        if self.count < 2:
            raise ValueError(f"FID needs at least two images, not {self.count}.")
        mean = self._sum / self.count
        covariance = (self._products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return Gaussian((self._shift + mean).cpu().numpy(), covariance.cpu().numpy(), self.count)


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Return the Frechet distance of two Gaussians, FID of features: by torch-fidelity, in fp64."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    parts = [{"mu": part.mean, "sigma": part.covariance} for part in (one, other)]
    return float(fid_statistics_to_metric(*parts, verbose=False)[KEY_METRIC_FID])


class InceptionScore:
    """The Inception score over splits of shuffled images, as torch-fidelity defines it: 10 splits, seed 2020.

    A split needs only the sums of its images' probabilities and of their negative entropies. Unreadable images leave
    their places empty.

    Args:
        num_images: number of images that will be requested.
        splits: S.
    """

    def __init__(self, num_images: int, splits: int = 10) -> None:
        order = np.random.RandomState(2020).permutation(num_images)
        split = np.empty(num_images, dtype=np.int64)
        for number in range(splits):
            start, stop = number * num_images // splits, (number + 1) * num_images // splits
            split[order[start:stop]] = number
        self._split = torch.from_numpy(split)
        self._counts = torch.zeros(splits, dtype=torch.float64)
        self._entropies = torch.zeros(splits, dtype=torch.float64)
        self._sums: Tensor | None = None

    def add(self, logits: Tensor, places: Tensor) -> None:
        """Add logits (B, C) of the images at positions `places` (B,) in reading order."""
        logits, split = logits.cpu().double(), self._split[places]
        logs = logits.log_softmax(1)
        probabilities = logs.exp()
        if self._sums is None:
            self._sums = torch.zeros(len(self._counts), logits.shape[1], dtype=torch.float64)
        self._sums.index_add_(0, split, probabilities)
        self._counts.index_add_(0, split, torch.ones(len(split), dtype=torch.float64))
        self._entropies.index_add_(0, split, (probabilities * logs).sum(1))

    def result(self) -> tuple[float, float]:
        """Return the mean over the non-empty splits, and its standard deviation."""
        assert self._sums is not None
        filled = self._counts > 0
        counts, sums = self._counts[filled], self._sums[filled]
        marginal = sums / counts[:, None]
        divergence = self._entropies[filled] / counts - torch.special.xlogy(marginal, marginal).sum(1)
        scores = divergence.exp()
        return float(scores.mean()), float(scores.std(correction=0))
