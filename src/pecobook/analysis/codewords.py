"""What a codebook's codewords are used for: usage, image features made of them, galleries, information.

Shapes: N images, codes int64 (N, h, w) with values in [0, K), codebook float (K, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pecobook.analysis.arrays import Array, as_numpy, as_tensor


@dataclass(frozen=True)
class CodeUsage:
    """How evenly a codebook is used."""

    codes_used: int
    """Number of codewords that occur at least once."""
    perplexity: float
    """exp of the entropy of the code distribution, in [1, K]; K when all codewords are equally frequent."""
    counts: NDArray[np.int64] = field(repr=False)
    """(K,) how often each codeword occurs."""


@dataclass(frozen=True)
class GalleryPatch:
    """One patch and what surrounds it."""

    image: int
    """Index of its image among those given."""
    row: int
    column: int
    """Its position in the code grid."""
    window: Tensor = field(repr=False)
    """float (3, s, s) in [0, 1]: the patch within its surroundings, cut from the image."""
    box: tuple[float, float, float, float]
    """Top, left, height and width of the patch within `window`, pixels."""


@dataclass(frozen=True)
class GalleryRow:
    """Patches that share one codeword."""

    codeword: int
    count: int
    """Patches with this codeword among all those given."""
    images: int
    """Images with at least one of them."""
    patches: tuple[GalleryPatch, ...]


@dataclass(frozen=True)
class Gallery:
    """Rows of patches, one row a codeword; codewords that were asked for first, then the most used."""

    rows: tuple[GalleryRow, ...]


def code_usage(codes: Array, num_codewords: int) -> CodeUsage:
    """Usage of a codebook of `num_codewords` over `codes`, int of any shape."""
    flat = as_numpy(codes).reshape(-1)
    if flat.size == 0:
        raise ValueError("code_usage needs at least one code")
    if flat.min() < 0 or flat.max() >= num_codewords:
        raise ValueError(f"codes run from {flat.min()} to {flat.max()}, outside [0, {num_codewords})")
    return usage_of_counts(np.bincount(flat, minlength=num_codewords).astype(np.int64))


def usage_of_counts(counts: NDArray[np.int64]) -> CodeUsage:
    """Usage of a codebook whose codewords occur so often, (K,)."""
    share = counts[counts > 0] / counts.sum()
    return CodeUsage(len(share), float(np.exp(-(share * np.log(share)).sum())), counts)


def distinct_codewords(codebook: Tensor, usage: Tensor, *, alike: float = 0.02) -> float:
    """How many codewords that differ are in use: the perplexity of usage to which codewords that are alike are one.

    Perplexity counts copies of one codeword as many, though which of them a vector chooses is decided by its last
    bits. Here a codeword's share is that of all codewords around it, after Leinster and Cobbold (Ecology 93(3), 2012).

    Args:
        codebook: float (K, D).
        usage: float (K,), how often each is used; in any unit.
        alike: two codewords are alike when they are no further apart than this times the mean length (root of the mean
            square) of the codewords in use.

    Returns:
        A number in [1, perplexity]; 1 when nothing is used.
    """
    share = usage / usage.sum().clamp_min(1e-12)  # (K,)
    used = share > 0
    share, vectors = share[used], codebook.detach().float()[used]
    limit = alike * (share @ vectors.square().sum(1)).sqrt()
    vectors = vectors - share @ vectors  # small numbers, so that small distances are right
    # In parts, since all K x K distances may be many.
    around = [(torch.cdist(part, vectors) <= limit).float() @ share for part in torch.split(vectors, 1024)]
    return float((-share @ torch.cat(around).clamp_min(1e-12).log()).exp())


def mean_codewords(codes: Array, codebook: Tensor) -> Tensor:
    """Average-pooled codewords of each image, float (N, D): the feature of the paper's Table 4, left column.

    `codes` is int (N, ...), `codebook` float (K, D).
    """
    index = as_tensor(codes).flatten(1).long()
    with torch.no_grad():
        return F.embedding_bag(index, codebook.detach().float().to(index.device), mode="mean")


def bag_of_codes(codes: Array, num_codewords: int) -> Tensor:
    """Square-rooted histogram of each image's codes, float (N, K), of L2 norm 1.

    The square root (Hellinger's map) keeps a code that fills the background from drowning all others. Unlike
    `mean_codewords` it sees only which codes occur, not where their codewords lie.
    """
    index = as_tensor(codes).flatten(1).long()
    bag = torch.zeros(len(index), num_codewords, device=index.device)
    bag.scatter_add_(1, index, torch.ones_like(index, dtype=bag.dtype))
    return (bag / index.shape[1]).sqrt()


def code_gallery(
    images: Tensor,
    codes: Array,
    *,
    codewords: int = 8,
    patches: int = 12,
    seed: int = 0,
    chosen: Sequence[int] = (),
    context: float = 1.0,
) -> Gallery:
    """Patches that share a codeword: rows for the `chosen` ones, then the most used, `codewords` in all.

    `images` float (N, 3, H, W) in [0, 1], or uint8; `codes` int (N, h, w). Patches are drawn by `(seed, codeword)`,
    one per image first, so that a row is not one image over and over and does not change when other rows do.
    Each comes with `context` patch sides of surroundings on every side, less at a border of the image, where
    the window moves inwards.
    """
    grid = as_numpy(codes)
    if grid.ndim != 3 or len(grid) != len(images):
        raise ValueError(f"code_gallery needs codes (N, h, w) for N images, got {grid.shape} for {len(images)}")
    counts = np.bincount(grid.reshape(-1), minlength=max(chosen, default=0) + 1)
    by_use = np.argsort(-counts, kind="stable")
    order = list(dict.fromkeys([*map(int, chosen), *(int(code) for code in by_use if counts[code] > 0)]))
    rows = []
    for code in order[: max(codewords, len(chosen))]:
        places = np.argwhere(grid == code)  # (count, 3): image, row, column
        picked = places[_one_per_image_first(places[:, 0], np.random.default_rng([seed, code]))[:patches]]
        crops = tuple(
            GalleryPatch(image, row, column, *patch_window(images[image], grid.shape[1:], row, column, context))
            for image, row, column in picked.tolist()
        )
        rows.append(GalleryRow(code, len(places), len(np.unique(places[:, 0])), crops))
    return Gallery(tuple(rows))


def _one_per_image_first(image: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """A random order of patches (count,) in which no image comes a second time before all came once."""
    order = rng.permutation(len(image))
    seen: dict[int, int] = {}
    turn = np.empty(len(order), dtype=np.int64)
    for place, index in enumerate(order):
        turn[place] = seen.get(int(image[index]), 0)
        seen[int(image[index])] = int(turn[place]) + 1
    return order[np.argsort(turn, kind="stable")]


def patch_window(
    image: Tensor, grid: tuple[int, ...], row: int, column: int, context: float
) -> tuple[Tensor, tuple[float, float, float, float]]:
    """The window, float in [0, 1], around one patch of an image (3, H, W), float or uint8, with a code grid (h, w); and
    the patch's box within it.
    """
    height, width = image.shape[-2:]
    patch_h, patch_w = height / grid[0], width / grid[1]
    side_h = min(round(patch_h * (1 + 2 * context)), height)
    side_w = min(round(patch_w * (1 + 2 * context)), width)
    top = min(max(round((row + 0.5) * patch_h - side_h / 2), 0), height - side_h)
    left = min(max(round((column + 0.5) * patch_w - side_w / 2), 0), width - side_w)
    window = image[:, top : top + side_h, left : left + side_w].detach().float().cpu().clone()
    if image.dtype == torch.uint8:
        window /= 255
    return window, (row * patch_h - top, column * patch_w - left, patch_h, patch_w)
