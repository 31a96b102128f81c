"""What codes go with: the class of the image, the colour of the patch, or its edges; measured alike, so that "semantic
rather than texture" is a number.

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

COLOUR_LEVELS = 3
"""Levels of each of red, green and blue; 27 colours."""
EDGE_LEVELS = 8
"""Levels of edge energy, equally filled but for patches that are alike."""
_PERMUTATIONS = 5
"""Of the images, over which the bias is averaged."""


@dataclass(frozen=True)
class Information:
    """How much a patch's code says about something else of that patch."""

    bits: float
    """Mutual information, plug-in estimate, minus what codes of other images would give: its bias."""
    share: float
    """Of what there is to know above that bias, in [0, 1]; 1 when the code tells it exactly."""
    purity: float
    """Percent of patches that have the most frequent value of their code."""
    null_purity: float
    """The same of codes of other images."""
    chance: float
    """Percent of patches that have the most frequent value of all."""


def joint_counts(codes: Array, values: Array, num_codes: int, num_values: int) -> NDArray[np.int64]:
    """How often each code goes with each value: (K, V); both int, of one shape."""
    pairs = as_numpy(codes).reshape(-1).astype(np.int64) * num_values + as_numpy(values).reshape(-1).astype(np.int64)
    return np.bincount(pairs, minlength=num_codes * num_values).reshape(num_codes, num_values)


def mutual_information(joint: NDArray[np.int64]) -> float:
    """Of counts (K, V), in bits: sum over cells of p log2(p / (p_code p_value))."""
    share = joint / joint.sum()
    independent = share.sum(1, keepdims=True) * share.sum(0, keepdims=True)
    seen = share > 0
    return float(max((share[seen] * np.log2(share[seen] / independent[seen])).sum(), 0.0))


def entropy(counts: NDArray[np.int64]) -> float:
    """Of counts (V,), in bits."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def information(codes: Array, values: Array, num_codes: int, *, seed: int = 0) -> Information:
    """What codes say about values; both int of one shape, images first, values from 0.

    With many codes and few images the plug-in estimate is far too high, all the more as the patches of an image have
    codes and values in common. Codes of whole images that are given to other images know nothing, so what they seem to
    know is taken off. The same seed and number of images give the same permutations, whatever the values are.
    """
    own, other = as_numpy(codes), as_numpy(values)
    num_values = int(other.max()) + 1
    joint = joint_counts(own, other, num_codes, num_values)
    rng = np.random.default_rng(seed)
    nulls = []  # (bits, purity)
    for _ in range(_PERMUTATIONS):
        null = joint_counts(rng.permutation(own), other, num_codes, num_values)
        nulls.append((mutual_information(null), _purity(null)))
    bias, null_purity = (float(value) for value in np.mean(nulls, axis=0))
    bits, room = max(mutual_information(joint) - bias, 0.0), entropy(joint.sum(0)) - bias
    return Information(
        bits=bits,
        share=min(bits / room, 1.0) if room > 1e-9 else 0.0,
        purity=_purity(joint),
        null_purity=null_purity,
        chance=100 * float(joint.sum(0).max() / joint.sum()),
    )


def _purity(joint: NDArray[np.int64]) -> float:
    """Percent of counts (K, V) that are the largest of their code."""
    return 100 * float(joint.max(1).sum() / joint.sum())


def patch_labels(labels: Array, grid: tuple[int, int]) -> NDArray[np.int64]:
    """The label of each patch's image: int (N,) to (N, h, w)."""
    _, number = np.unique(as_numpy(labels), return_inverse=True)
    return np.broadcast_to(number.reshape(-1, 1, 1), (len(number), *grid))


def patch_colours(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """A coarse colour of each patch: its mean red, green and blue, three levels each; int64 (N, h, w) in [0, 27)."""
    mean = F.adaptive_avg_pool2d(images, grid)  # (N, 3, h, w)
    level = (mean * COLOUR_LEVELS).long().clamp(0, COLOUR_LEVELS - 1)
    red, green, blue = level.unbind(1)
    return (red * COLOUR_LEVELS + green) * COLOUR_LEVELS + blue


def patch_edges(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """How strong a patch's edges are, in eight levels: int64 (N, h, w).

    Mean magnitude of the gradient of brightness (Sobel's filter) within the patch. Levels are equally filled, but equal
    patches share the lowest of theirs: all flat ones are alike.
    """
    energy = torch.cat([_edge_energy(part, grid) for part in torch.split(images, 64)])  # (N, h, w)
    energy = (energy * 1e6).round()  # a flat patch is not quite 0 after rounding
    ranks = torch.searchsorted(energy.flatten().sort().values, energy)
    return ranks * EDGE_LEVELS // ranks.numel()


def _edge_energy(images: Tensor, grid: tuple[int, int]) -> Tensor:
    grey = images.mean(1, keepdim=True)
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]) / 8
    kernels = torch.stack([sobel, sobel.t()])[:, None].to(images)
    gradient = F.conv2d(F.pad(grey, (1, 1, 1, 1), "replicate"), kernels)
    return F.adaptive_avg_pool2d(gradient.norm(dim=1, keepdim=True), grid)[:, 0]
