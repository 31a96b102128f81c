"""Neighbours of codewords, and their arrangement by similarity: in a plane, and on a grid.

Shapes: codebook float (K, D).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pecobook.analysis.arrays import as_numpy

_LANDMARKS = 1024
"""Maximum number of codewords that t-SNE places, 6 s on one core; the others are placed between them."""
_MATCHED = 512
"""Maximum number of codewords that are assigned to cells exactly, since this takes cubic time."""


def nearest_used(codebook: Tensor, codeword: int, counts: NDArray[np.int64], number: int = 4) -> list[int]:
    """Return the `number` nearest codewords to `codeword` in use, nearest first; `counts` (K,) is the usage."""
    vectors = codebook.detach().float().cpu()
    nearest = torch.cdist(vectors[[codeword]], vectors)[0].argsort(stable=True).tolist()
    return [other for other in nearest if other != codeword and counts[other] > 0][:number]


def project_to_plane(codebook: Tensor, *, seed: int = 0) -> NDArray[np.float32]:
    """Project codewords to a plane, (K, 2), with t-SNE, which preserves neighbourhoods, or PCA for few codewords.

    For a large codebook, t-SNE places a random subset, and each other codeword lies between its three nearest in it.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.neighbors import KNeighborsRegressor

    vectors = as_numpy(codebook.detach()).astype(np.float32)
    K = len(vectors)
    landmarks = np.sort(np.random.default_rng(seed).permutation(K)[:_LANDMARKS])
    placed = vectors[landmarks]
    if min(placed.shape) >= 2:
        plane = PCA(2, random_state=seed).fit_transform(placed)
    else:
        plane = np.pad(placed, ((0, 0), (0, 1)))[:, :2]
    if len(placed) >= 8:
        start = plane / (plane[:, 0].std() + 1e-12) * 1e-4
        perplexity = min(30.0, (len(placed) - 1) / 3)
        plane = TSNE(2, init=start, perplexity=perplexity, random_state=seed).fit_transform(placed)
    if len(placed) < K:
        plane = KNeighborsRegressor(3, weights="distance").fit(placed, plane).predict(vectors)
    return np.asarray(plane, dtype=np.float32)


def grid_cells(plane: NDArray[np.float32]) -> NDArray[np.int64]:
    """Assign points (M, 2) to different cells of a nearly square grid, so that near points stay near each other.

    The points are split in half along the longer side of the grid until few are left, which get the cells with the
    smallest sum of squared distances.

    Returns:
        row and column of each point, int64 (M, 2). The last row is filled from the left.
    """
    M = len(plane)
    columns = math.isqrt(max(M - 1, 0)) + 1
    cells = np.stack(np.divmod(np.arange(M), columns), 1)  # (M, 2)
    # x increases to the right and y downwards; ranks spread dense and sparse regions evenly.
    ranks = np.stack([plane[:, 1].argsort(kind="stable").argsort(), plane[:, 0].argsort(kind="stable").argsort()], 1)
    assigned = np.empty((M, 2), dtype=np.int64)
    parts = [(np.arange(M), cells)]
    while parts:
        points, free = parts.pop()
        if len(points) <= _MATCHED:
            assigned[points] = free[_matched(ranks[points], free)]
            continue
        axis = int(np.ptp(free[:, 1]) >= np.ptp(free[:, 0]))
        free, half = free[free[:, axis].argsort(kind="stable")], len(free) // 2
        points = points[ranks[points, axis].argsort(kind="stable")]
        parts += [(points[:half], free[:half]), (points[half:], free[half:])]
    return assigned


def _matched(points: NDArray[np.int64], cells: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the index of the cell of each point, with the smallest sum of squared distances in their common frame."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    frames = [(part - part.min(0)) / np.maximum(np.ptp(part, axis=0), 1) for part in (points, cells)]
    cost = cdist(*frames, "sqeuclidean")
    return np.asarray(linear_sum_assignment(cost)[1], dtype=np.int64)
