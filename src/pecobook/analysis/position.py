"""How far codes depend on the position in the image rather than on the content of the patch.

A tokenizer whose codes represent content uses every codeword at every position, and its codes move with the image. A
tokenizer can also give each position its own vocabulary. Its codes then distinguish images well, because the mean of an
image's codewords still tells which code is where, but a code does not mean the same at two positions.

Shapes: N images, codes int (N, h, w) in [0, K), P = h w positions, images float (N, 3, H, W) in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pecobook.analysis.arrays import Array, Tokenizer, as_numpy
from pecobook.analysis.reconstruction import encode_all
from pecobook.analysis.semantics import entropy

MIN_PATCHES = 10
"""Minimum number of patches of a codeword that counts for `bound`."""
_PERMUTATIONS = 5


@dataclass(frozen=True)
class Position:
    """How far codes depend on the position."""

    share: float
    """Mutual information of code and position over the entropy of the position, in [0, 1]; 1 if the code determines
    the position."""
    null_share: float
    """`share` of codes that are permuted between the positions of each image, which is not 0 for few images."""
    bound: float
    """Percentage of the codewords with at least `MIN_PATCHES` patches that occur at a single position."""
    null_bound: float
    """`bound` of permuted codes."""


def position_dependence(codes: Array, *, seed: int = 0) -> Position:
    """Measure how far codes (N, h, w) depend on the position; `seed` determines the permutations."""
    flat = as_numpy(codes).reshape(len(codes), -1).astype(np.int64)
    rng = np.random.default_rng(seed)
    nulls = [_share_and_bound(rng.permuted(flat, axis=1)) for _ in range(_PERMUTATIONS)]
    (share, bound), (null_share, null_bound) = _share_and_bound(flat), np.mean(nulls, axis=0)
    return Position(share, float(null_share), bound, float(null_bound))


def _share_and_bound(flat: NDArray[np.int64]) -> tuple[float, float]:
    """Return the share of information and the percentage of bound codewords, for codes (N, P)."""
    num_positions = flat.shape[1]
    positions = np.broadcast_to(np.arange(num_positions), flat.shape)
    code_counts = np.bincount(flat.ravel())
    pairs = np.unique(flat * num_positions + positions)  # codes with the positions at which they occur
    num_places = np.bincount(pairs // num_positions, minlength=len(code_counts))
    is_frequent = code_counts >= MIN_PATCHES
    bound = 100 * float((num_places[is_frequent] == 1).mean()) if is_frequent.any() else float("nan")
    return (_bits(flat, positions) / float(np.log2(num_positions)) if num_positions > 1 else 0.0), bound


def _bits(codes: NDArray[np.int64], values: NDArray[np.int64]) -> float:
    """Compute the mutual information in bits of two arrays of one shape, from the pairs that occur."""
    codes, values = (array.ravel().astype(np.int64, copy=False) for array in (codes, values))
    pairs = codes * (int(values.max()) + 1) + values
    each, other, joint = (np.unique(array, return_counts=True)[1] for array in (codes, values, pairs))
    return max(entropy(each) + entropy(other) - entropy(joint), 0.0)


def information_given_position(codes: Array, values: Array, *, seed: int = 0) -> float:
    """Return the information of codes about values at the same position, as a share of the entropy there, in [0, 1].

    The mutual information is computed at each position and averaged. The estimate for codes that are permuted between
    images, which keep their positions, is subtracted, as in `semantics.information`.

    Args:
        codes: int (N, h, w).
        values: int from 0, with the shape of `codes`.
        seed: seed of the permutations.
    """
    flat, targets = (as_numpy(array).reshape(len(codes), -1) for array in (codes, values))

    def mean_bits(flat: NDArray[np.int64]) -> float:
        return float(np.mean([_bits(flat[:, p], targets[:, p]) for p in range(flat.shape[1])]))

    rng = np.random.default_rng(seed)
    bias = float(np.mean([mean_bits(rng.permutation(flat)) for _ in range(_PERMUTATIONS)]))
    max_bits = float(np.mean([entropy(np.bincount(column)) for column in targets.T])) - bias
    return min(max(mean_bits(flat) - bias, 0.0) / max_bits, 1.0) if max_bits > 1e-9 else 0.0


def moved_codes(tokenizer: Tokenizer, images: Tensor, stride: int) -> dict[str, float]:
    """Return the percentage of codes that move with the image when it moves by one token.

    Args:
        tokenizer: encodes images whose sides are multiples of the stride.
        images: float (N, 3, S + stride, S + stride), one token larger than the tokenizer's images.
        stride: side of a token in pixels.

    Returns:
        `roll`, where pixels that leave the image re-enter on the opposite side, which creates an edge there; and
        `crop`, where a second crop starts one token further right and down. Only codes present in both images count.
    """
    first = images[..., :-stride, :-stride]
    codes = encode_all(tokenizer, first)
    rolled = encode_all(tokenizer, torch.roll(first, (stride, stride), (2, 3)))
    cropped = encode_all(tokenizer, images[..., stride:, stride:])
    return {
        "roll": 100 * float((rolled[:, 1:, 1:] == codes[:, :-1, :-1]).float().mean()),
        "crop": 100 * float((cropped[:, :-1, :-1] == codes[:, 1:, 1:]).float().mean()),
    }


def checkerboard(grid: tuple[int, int]) -> Tensor:
    """Return half of the positions of a grid, as the black fields of a checkerboard: bool (h, w)."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return (rows + columns) % 2 == 0


def opposite_halves(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the codes of one half of the positions of some images, and those of the other half of other images.

    A probe trained on the first and tested on the second has its position removed: codes that are meaningful at a
    single position do not help it.

    Args:
        train: int (M, h, w).
        test: int (N, h, w).

    Returns:
        int (M, P / 2) and (N, P / 2); None if a half has fewer than two positions.
    """
    half = checkerboard((train.shape[1], train.shape[2]))
    return (train[:, half], test[:, ~half]) if min(int(half.sum()), int((~half).sum())) >= 2 else None


def commonest_code_accuracy(train_codes: Tensor, codes: Tensor, mask: Tensor) -> float:
    """Return the percentage of masked codes that are the most frequent code of their position in other images.

    A masked model that predicts no better has learned nothing but where in the image a code occurs.

    Args:
        train_codes: int64 (M, h, w), codes of other images.
        codes: int64 (N, h, w).
        mask: bool (N, h, w), True = masked.
    """
    columns = as_numpy(train_codes).reshape(len(train_codes), -1).T  # (P, M)
    commonest = torch.tensor([np.bincount(column).argmax() for column in columns]).view(codes.shape[1:])
    return 100 * float((codes == commonest)[mask].float().mean())


def position_baseline(codes: Tensor, mask: Tensor) -> float | None:
    """Return the percentage of masked codes that are the most frequent code of their position in other images.

    The images with even indices and the images with odd indices predict each other.

    Args:
        codes: int64 (N, h, w).
        mask: bool (N, h, w), True = masked; equally many patches are masked in each image.

    Returns:
        the percentage, or None for a single image.
    """
    if len(codes) < 2:
        return None
    even, odd = slice(0, None, 2), slice(1, None, 2)
    accuracies = [commonest_code_accuracy(codes[b], codes[a], mask[a]) for a, b in ((even, odd), (odd, even))]
    return float(np.average(accuracies, weights=[len(codes[even]), len(codes[odd])]))
