"""How images use the codewords of a codebook: usage, image features made of codes, and galleries of patches.

Shapes: N images, codes int64 (N, h, w) with values in [0, K), codebook float (K, D).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pecobook.analysis.arrays import Array, as_numpy

_EXACT, _SAMPLE = 2**14, 2**10
"""Maximum number of used codewords that are all compared with each other, and the sample size above it."""


@dataclass(frozen=True)
class CodeUsage:
    """How evenly a codebook is used."""

    codes_used: int
    """Number of codewords that occur at least once."""
    perplexity: float
    """exp of the entropy of the code distribution, in [1, K]; K if all codewords are equally frequent."""
    counts: NDArray[np.int64] = field(repr=False)
    """Number of occurrences of each codeword, (K,)."""


@dataclass(frozen=True)
class GalleryPatch:
    """One patch with its surroundings."""

    image: int
    """Index of the patch's image."""
    row: int
    """Row of the patch in the code grid."""
    column: int
    """Column of the patch in the code grid."""
    window: Tensor = field(repr=False)
    """The patch with its surroundings, cut from the image: float (3, s, s) in [0, 1]."""
    box: tuple[float, float, float, float]
    """Top, left, height and width of the patch within `window` in pixels."""


@dataclass(frozen=True)
class GalleryRow:
    """Patches that share one codeword."""

    codeword: int
    images: int
    """Number of images with at least one patch of the codeword."""
    positions: NDArray[np.int64] = field(repr=False)
    """Number of patches of the codeword at each position of the code grid, in all images, (h, w)."""
    patches: tuple[GalleryPatch, ...]

    @property
    def count(self) -> int:
        """Number of patches of the codeword in all images."""
        return int(self.positions.sum())


def code_usage(codes: Array, num_codewords: int) -> CodeUsage:
    """Measure the usage of a codebook of `num_codewords` codewords by `codes`, int of any shape."""
    flat = as_numpy(codes).reshape(-1)
    if flat.size == 0:
        raise ValueError("code_usage needs at least one code")
    if flat.min() < 0 or flat.max() >= num_codewords:
        raise ValueError(f"codes run from {flat.min()} to {flat.max()}, outside [0, {num_codewords})")
    return usage_from_counts(np.bincount(flat, minlength=num_codewords).astype(np.int64))


def usage_from_counts(counts: NDArray[np.int64]) -> CodeUsage:
    """Measure the usage of a codebook from the number of occurrences of each codeword, (K,)."""
    share = counts[counts > 0] / counts.sum()
    return CodeUsage(len(share), float(np.exp(-(share * np.log(share)).sum())), counts)


def distinct_codewords(codebook: Tensor, usage: Tensor, *, tolerance: float = 0.02) -> float:
    """Return the effective number of distinct codewords: a perplexity that counts similar codewords as one.

    The usual perplexity counts copies of one codeword separately, although rounding errors decide which copy is nearest
    to a vector. Here the share of a codeword is the total share of all codewords similar to it, after Leinster and
    Cobbold (Ecology 93(3), 2012).

    Args:
        codebook: float (K, D).
        usage: float (K,), how often each codeword is used, in any unit.
        tolerance: two codewords are similar if their distance is at most `tolerance` times the root mean square length
            of the codewords in use.

    Returns:
        A number in [1, perplexity]; 1 if no codeword is used.
    """
    share = usage / usage.sum().clamp_min(1e-12)  # (K,)
    used = share > 0
    share, vectors = share[used], codebook.detach().float()[used]
    limit = tolerance * (share @ vectors.square().sum(1)).sqrt()
    vectors = vectors - share @ vectors  # centred, so that small distances are accurate
    of, weight = vectors, share
    if len(share) > _EXACT:  # the entropy is a mean over codewords: for a large one it is estimated from a sample
        generator = torch.Generator().manual_seed(0)
        chosen = torch.multinomial(share.cpu(), _SAMPLE, replacement=True, generator=generator).to(share.device)
        of, weight = vectors[chosen], torch.full_like(share[chosen], 1 / _SAMPLE)
    # In parts, because K x K distances may need too much memory.
    rows = min(1024, max(2**23 // max(len(vectors), 1), 1))
    similar_share = [(torch.cdist(part, vectors) <= limit).float() @ share for part in torch.split(of, rows)]
    return float((-weight @ torch.cat(similar_share).clamp_min(1e-12).log()).exp())


def mean_codewords(codes: Array, codebook: Tensor) -> Tensor:
    """Return the average-pooled codewords of each image, float (N, D): the feature of the paper's Table 4, left column.

    `codes` is int (N, ...), `codebook` float (K, D).
    """
    codes = torch.as_tensor(codes).flatten(1)
    codebook = codebook.detach().float().to(codes.device)
    means = codebook.new_empty(len(codes), codebook.shape[1])
    with torch.no_grad():  # some images at a time, since their indices take four times the memory of 2-byte codes
        for part, chosen in zip(torch.split(means, 2**16), torch.split(codes, 2**16), strict=True):
            part.copy_(F.embedding_bag(chosen.long(), codebook, mode="mean"))
    return means


def bag_of_codes(codes: Array, num_codewords: int) -> Tensor:
    """Return the square-rooted histogram of each image's codes, float (N, K), with L2 norm 1.

    The square root (the Hellinger map) prevents a code that fills the background from dominating all others. Unlike
    `mean_codewords`, this feature depends only on which codes occur, not on the vectors of their codewords.
    """
    index = torch.as_tensor(codes).flatten(1).long()
    bag = torch.zeros(len(index), num_codewords, device=index.device)
    bag.scatter_add_(1, index, bag.new_ones(()).expand(index.shape))
    return bag.div_(index.shape[1]).sqrt_()  # in place: bags of many images fill gigabytes


def code_gallery(
    images: Tensor,
    codes: Array,
    *,
    codewords: int = 8,
    patches: int = 12,
    seed: int = 0,
    chosen: Sequence[int] = (),
) -> list[GalleryRow]:
    """Collect patches that share a codeword, in one row per codeword.

    `(seed, codeword)` determines which patches are drawn, so a row does not depend on the other rows. Every image
    contributes one patch before any contributes a second.

    Args:
        images: float (N, 3, H, W) in [0, 1], or uint8.
        codes: int (N, h, w).
        codewords: number of rows; the `chosen` codewords come first, then the most used ones.
        patches: maximum number of patches in a row.
        seed: seed of the choice of patches.
        chosen: codewords that always get a row.
    """
    grid = as_numpy(codes)
    if grid.ndim != 3 or len(grid) != len(images):
        raise ValueError(f"code_gallery needs codes (N, h, w) for N images, got {grid.shape} for {len(images)}")
    counts = np.bincount(grid.reshape(-1), minlength=max(chosen, default=0) + 1)
    by_use = np.argsort(-counts, kind="stable")
    order = list(dict.fromkeys([*map(int, chosen), *(int(code) for code in by_use if counts[code] > 0)]))
    rows = []
    for code in order[: max(codewords, len(chosen))]:
        has_code = grid == code
        occurrences = np.argwhere(has_code)  # (count, 3): image, row, column
        drawn = occurrences[one_per_image_first(occurrences[:, 0], np.random.default_rng([seed, code]))[:patches]]
        crops = tuple(
            gallery_patch(image, images[image], grid.shape[1:], row, column) for image, row, column in drawn.tolist()
        )
        rows.append(GalleryRow(code, len(np.unique(occurrences[:, 0])), has_code.sum(0), crops))
    return rows


def query_points(num_images: int, number: int, *, seed: int = 0) -> list[tuple[int, float, float]]:
    """Draw places (image, y, x) in distinct images, with y and x in the middle half of an image of side 1."""
    rng = np.random.default_rng(seed)
    images = rng.permutation(num_images)[:number].tolist()
    return [(image, *rng.uniform(0.25, 0.75, 2).tolist()) for image in images]


def matches(
    images: Tensor, codes: Array, points: Sequence[tuple[int, float, float]], *, patches: int = 6, seed: int = 0
) -> list[tuple[GalleryPatch, GalleryRow]]:
    """Return the patch at each place, and patches of other images that share its codeword, drawn at random.

    `images` and `codes` are those of `code_gallery`, and `points` those of `query_points`.
    """
    grid = as_numpy(codes)
    found = []
    for image, y, x in points:
        row, column = int(y * grid.shape[1]), int(x * grid.shape[2])
        code = int(grid[image, row, column])
        (gallery,) = code_gallery(images, grid, codewords=1, patches=patches + 1, seed=seed, chosen=[code])
        others = tuple(patch for patch in gallery.patches if patch.image != image)[:patches]
        query = gallery_patch(image, images[image], grid.shape[1:], row, column)
        found.append((query, dataclasses.replace(gallery, patches=others)))
    return found


def one_per_image_first(image: NDArray[Any], rng: np.random.Generator) -> NDArray[np.int64]:
    """Order patches of the given images (count,) at random; no image recurs before all have occurred."""
    order = rng.permutation(len(image))
    num_earlier: dict[int, int] = {}
    rounds = np.empty(len(order), dtype=np.int64)
    for position, index in enumerate(order):
        rounds[position] = num_earlier.get(int(image[index]), 0)
        num_earlier[int(image[index])] = int(rounds[position]) + 1
    return order[np.argsort(rounds, kind="stable")]


def gallery_patch(image: int, pixels: Tensor, grid: tuple[int, ...], row: int, column: int) -> GalleryPatch:
    """Cut one patch out of an image, with surroundings of the patch's size on each side.

    At the border of the image the window moves inwards.

    Args:
        image: index of the image.
        pixels: the image, (3, H, W), float in [0, 1] or uint8.
        grid: rows and columns of the code grid.
        row: row of the patch in the grid.
        column: column of the patch in the grid.
    """
    height, width = pixels.shape[-2:]
    patch_h, patch_w = height / grid[0], width / grid[1]
    side_h, side_w = min(round(3 * patch_h), height), min(round(3 * patch_w), width)
    top = min(max(round((row + 0.5) * patch_h - side_h / 2), 0), height - side_h)
    left = min(max(round((column + 0.5) * patch_w - side_w / 2), 0), width - side_w)
    window = pixels[:, top : top + side_h, left : left + side_w].detach().float().cpu().clone()
    if pixels.dtype == torch.uint8:
        window /= 255
    return GalleryPatch(image, row, column, window, (row * patch_h - top, column * patch_w - left, patch_h, patch_w))
