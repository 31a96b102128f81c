"""Mutual information of codes with the image's class, the patch's colour, and the patch's edges.

All three are measured in the same way, so that numbers show whether codes are semantic or describe texture.

Shapes: N images, codes int (N, h, w) in [0, K), labels int (N,), images float (N, 3, H, W) in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pecobook.analysis.arrays import Array, as_numpy
from pecobook.analysis.reconstruction import float_parts

COLOUR_LEVELS = 3
"""Number of levels of red, green and blue, which give 27 colours."""
EDGE_LEVELS = 8
"""Number of levels of edge energy; the levels are equally frequent, except that equal patches share a level."""
_PERMUTATIONS = 5
"""Number of permutations of the images over which the bias is averaged."""


@dataclass(frozen=True)
class Information:
    """How much information a patch's code contains about another value of the patch."""

    bits: float
    """Plug-in estimate of the mutual information, minus the estimate for codes of other images (the bias)."""
    share: float
    """`bits` divided by the entropy of the values minus the bias, in [0, 1]; 1 if the code determines the value."""
    purity: float
    """Percentage of patches that have the most frequent value of their code."""
    null_purity: float
    """The purity of codes of other images."""
    chance: float
    """Percentage of patches that have the most frequent value."""


def joint_counts(codes: Array, values: Array, num_codes: int, num_values: int) -> NDArray[np.int64]:
    """Count how often each code occurs together with each value, (K, V); both are int, of the same shape."""
    pairs = as_numpy(codes).reshape(-1).astype(np.int64) * num_values + as_numpy(values).reshape(-1).astype(np.int64)
    return np.bincount(pairs, minlength=num_codes * num_values).reshape(num_codes, num_values)


def mutual_information(joint: NDArray[np.int64]) -> float:
    """Compute the mutual information in bits from counts (K, V)."""
    return max(entropy(joint.sum(1)) + entropy(joint.sum(0)) - entropy(joint), 0.0)


def entropy(counts: NDArray[np.int64]) -> float:
    """Compute the entropy in bits from counts of any shape."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def information(codes: Array, values: Array, num_codes: int, *, seed: int = 0) -> Information:
    """Measure the information that codes contain about values.

    With many codes and few images, the plug-in estimate is far too high, especially because the patches of an image
    share codes and values. The estimate for codes that are permuted between images, which contain no information, is
    therefore subtracted. The permutations depend only on the seed and the number of images, not on the values.

    Args:
        codes: int, with the images as the first dimension.
        values: int from 0, with the shape of `codes`.
        num_codes: number of codewords.
        seed: seed of the permutations.
    """
    codes, values = as_numpy(codes), as_numpy(values)
    num_values = int(values.max()) + 1
    joint = joint_counts(codes, values, num_codes, num_values)
    rng = np.random.default_rng(seed)
    nulls = []  # (bits, purity)
    for _ in range(_PERMUTATIONS):
        null = joint_counts(rng.permutation(codes), values, num_codes, num_values)
        nulls.append((mutual_information(null), _purity(null)))
    bias, null_purity = (float(value) for value in np.mean(nulls, axis=0))
    bits, max_bits = max(mutual_information(joint) - bias, 0.0), entropy(joint.sum(0)) - bias
    return Information(
        bits=bits,
        share=min(bits / max_bits, 1.0) if max_bits > 1e-9 else 0.0,
        purity=_purity(joint),
        null_purity=null_purity,
        chance=100 * float(joint.sum(0).max() / joint.sum()),
    )


def _purity(joint: NDArray[np.int64]) -> float:
    """Return the percentage of patches that have the most frequent value of their code, from counts (K, V)."""
    return 100 * float(joint.max(1).sum() / joint.sum())


def patch_labels(labels: Array, grid: tuple[int, int]) -> NDArray[np.int64]:
    """Return the label of each patch's image, renumbered from 0: int (N,) to (N, h, w)."""
    _, numbers = np.unique(as_numpy(labels), return_inverse=True)
    return np.broadcast_to(numbers.reshape(-1, 1, 1), (len(numbers), *grid))


def patch_colours(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the mean colour of each patch with three levels of red, green and blue: int64 (N, h, w) in [0, 27)."""
    mean = torch.cat([F.adaptive_avg_pool2d(part, grid) for part in float_parts(images)])  # (N, 3, h, w)
    level = (mean * COLOUR_LEVELS).long().clamp(0, COLOUR_LEVELS - 1)
    red, green, blue = level.unbind(1)
    return (red * COLOUR_LEVELS + green) * COLOUR_LEVELS + blue


def patch_edges(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the strength of each patch's edges in eight levels: int64 (N, h, w).

    The strength is the mean magnitude of the brightness gradient (Sobel filter) within the patch. The levels are
    equally frequent, except that equal patches, such as all flat patches, share their lowest level.
    """
    energy = torch.cat([_edge_energy(part, grid) for part in float_parts(images)])  # (N, h, w)
    energy = (energy * 1e6).round()  # rounding errors make the energy of a flat patch slightly larger than 0
    ranks = torch.searchsorted(energy.flatten().sort().values, energy)
    return ranks * EDGE_LEVELS // ranks.numel()


def _edge_energy(images: Tensor, grid: tuple[int, int]) -> Tensor:
    grey = images.mean(1, keepdim=True)
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]) / 8
    kernels = torch.stack([sobel, sobel.t()])[:, None].to(images)
    gradient = F.conv2d(F.pad(grey, (1, 1, 1, 1), "replicate"), kernels)
    return F.adaptive_avg_pool2d(gradient.norm(dim=1, keepdim=True), grid)[:, 0]
