"""Where each codeword of a codebook occurs, and with which classes, in memory that grows only with the patches.

Shapes: N images, code grid (h, w), P = h w places, K codewords, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pecobook.analysis.arrays import Array, as_numpy
from pecobook.analysis.codewords import one_per_image_first

MIN_IMAGES = 5
"""Minimum number of images of a class with a codeword for the class to count as evidence."""
_LEVEL = 0.05
_MOST_DRAWN = 4096  # occurrences among which exemplars are chosen

Integers = NDArray[np.int32]


@dataclass(frozen=True)
class Occurrences:
    """All patches, sorted by codeword, then by image and place."""

    patches: Integers = field(repr=False)
    """(N P,): number of each patch among all patches of all images, image after image, row after row."""
    starts: NDArray[np.int64] = field(repr=False)
    """(K + 1,): the patches of codeword k are `patches[starts[k] : starts[k + 1]]`."""
    grid: tuple[int, int]
    num_images: int

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of patches of each codeword, (K,)."""
        return np.diff(self.starts)

    @property
    def images_with(self) -> NDArray[np.int64]:
        """Number of images with each codeword, (K,)."""
        return np.bincount(self.in_images()[0], minlength=len(self.starts) - 1)

    def of(self, codeword: int) -> Integers:
        """Return the patches of a codeword, (count, 3): image, row, column."""
        patches = self.patches[self.starts[codeword] : self.starts[codeword + 1]]
        return np.stack(np.unravel_index(patches, (self.num_images, *self.grid)), axis=1).astype(np.int32)

    def exemplars(self, codeword: int, number: int, seed: int = 0) -> Integers:
        """Draw patches of a codeword, (at most `number`, 3); each image gives one before any image gives a second.

        `(seed, codeword)` determines the patches.
        """
        found, rng = self.of(codeword), np.random.default_rng([seed, codeword])
        if len(found) > _MOST_DRAWN:
            found = found[np.sort(rng.choice(len(found), _MOST_DRAWN, replace=False))]
        return found[one_per_image_first(found[:, 0], rng)[:number]]

    def codewords(self) -> Integers:
        """Return the codeword of each of `patches`, (N P,)."""
        return np.repeat(np.arange(len(self.starts) - 1, dtype=np.int32), self.counts)

    def in_images(self) -> tuple[Integers, Integers, NDArray[np.int64]]:
        """Return each pair of a codeword and an image that contains it, and the number of its patches there."""
        image, codeword = self.patches // (self.grid[0] * self.grid[1]), self.codewords()
        # The patches are sorted, so those of one codeword in one image are adjacent.
        is_first = np.diff(image, prepend=-1).astype(bool) | np.diff(codeword, prepend=-1).astype(bool)
        starts = np.flatnonzero(is_first)
        return codeword[starts], image[starts], np.diff(starts, append=len(image))


def occurrences(codes: Array, num_codewords: int) -> Occurrences:
    """Sort the patches of images with codes int (N, h, w) by their codeword."""
    grid = as_numpy(codes)
    flat = grid.reshape(-1)
    counts = np.bincount(flat, minlength=num_codewords)
    starts = np.concatenate([[0], np.cumsum(counts)])
    patches = np.argsort(flat, kind="stable").astype(np.int32)
    return Occurrences(patches, starts, (grid.shape[1], grid.shape[2]), len(grid))


def main_places(found: Occurrences) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each codeword's most frequent position and its number of patches there, (K,) each; 0 for an unused one."""
    num_places = found.grid[0] * found.grid[1]
    pairs = found.codewords().astype(np.int64) * num_places + found.patches % num_places
    values, number = np.unique(pairs, return_counts=True)
    return _largest(values // num_places, values % num_places, number, len(found.starts) - 1)


def _largest(
    codeword: NDArray[Any], value: NDArray[Any], number: NDArray[Any], num_codewords: int
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return the first value with the largest number, and that number, for each codeword: (K,) each.

    The rows are sorted by codeword; a codeword without rows has zeros.
    """
    best, most = np.zeros(num_codewords, dtype=np.int64), np.zeros(num_codewords, dtype=number.dtype)
    starts = np.flatnonzero(np.diff(codeword, prepend=-1))
    most[codeword[starts]] = np.maximum.reduceat(number, starts)
    rows = np.flatnonzero(number == most[codeword])[::-1]  # the last assignment counts: the first of equal values
    best[codeword[rows]] = value[rows]
    return best, most


@dataclass(frozen=True)
class ClassShare:
    """How much more often a codeword occurs in images of one class than in others."""

    name: str
    share: float
    """Percentage of the images with the codeword that have the class."""
    base: float
    """Percentage of all images that have the class."""
    lift: float
    """`share` divided by `base`."""


@dataclass(frozen=True)
class ClassCounts:
    """How often codewords and classes occur together; a row for each pair that does, sorted by codeword."""

    codeword: Integers = field(repr=False)
    label: Integers = field(repr=False)
    images: Integers = field(repr=False)
    """Number of images of the class with the codeword."""
    patches: Integers = field(repr=False)
    """Number of patches of the codeword in images of the class."""
    lift: NDArray[np.float32] = field(repr=False)
    """Share of the class among the images with the codeword divided by its share among all images."""
    is_evidence: NDArray[np.bool_] = field(repr=False)
    """Whether the class is more frequent than by chance; see `class_counts`."""
    class_sizes: NDArray[np.int64]
    """Number of images of each class, (C,)."""
    images_with: NDArray[np.int64] = field(repr=False)
    """Number of images with each codeword, (K,)."""

    def rows(self, codeword: int) -> slice:
        """Return the rows of a codeword."""
        first, last = np.searchsorted(self.codeword, [codeword, codeword + 1])
        return slice(int(first), int(last))

    def purity(self, counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return each codeword's most frequent class and the percentage of its patches in it; `counts` are (K,)."""
        label, most = _largest(self.codeword, self.label, self.patches, len(counts))
        return label, 100 * most / np.maximum(counts, 1)

    def share(self, row: int, classes: Sequence[str]) -> ClassShare:
        """Return a row as a record, given the names of the classes."""
        label, images_with = int(self.label[row]), int(self.images_with[self.codeword[row]])
        base = 100 * float(self.class_sizes[label] / self.class_sizes.sum())
        return ClassShare(classes[label], 100 * int(self.images[row]) / images_with, base, float(self.lift[row]))

    def best(self) -> NDArray[np.int64]:
        """Return, for each codeword with evidence, the row with the highest lift that is evidence."""
        rows = np.flatnonzero(self.is_evidence)
        rows = rows[np.lexsort((-self.lift[rows], self.codeword[rows]))]
        return rows[np.diff(self.codeword[rows], prepend=-1) > 0]

    def shares(self, classes: Sequence[str]) -> dict[int, ClassShare]:
        """Return the rows of `best` as records, by codeword."""
        return {int(self.codeword[row]): self.share(row, classes) for row in self.best().tolist()}


def class_counts(found: Occurrences, labels: Array, num_classes: int) -> ClassCounts:
    """Count how often codewords and classes co-occur.

    Images are counted, not patches, because the patches of an image are not independent. A class is evidence if at
    least `MIN_IMAGES` of its images have the codeword, and the binomial probability of at least so many by chance is
    below 0.05 after Bonferroni's correction for all classes and all codewords in use.

    Args:
        found: the patches of N images.
        labels: the class of each image, int (N,).
        num_classes: C.
    """
    from scipy.special import bdtrc

    label_of, K = as_numpy(labels).astype(np.int64), len(found.starts) - 1
    codeword, image, together = found.in_images()
    images_with = np.bincount(codeword, minlength=K)
    pairs, row, images = np.unique(
        codeword.astype(np.int64) * num_classes + label_of[image], return_inverse=True, return_counts=True
    )
    patches = np.bincount(row, weights=together)
    sizes = np.bincount(label_of, minlength=num_classes)
    codeword, label = pairs // num_classes, pairs % num_classes
    base = sizes[label] / len(label_of)
    chance = bdtrc(images - 1, images_with[codeword], base)
    tests = max(int((images_with > 0).sum()), 1) * max(int((sizes > 0).sum()), 1)
    lift = images / images_with[codeword] / base
    is_evidence = (images >= MIN_IMAGES) & (chance * tests < _LEVEL) & (lift > 1)
    codeword, label, images, counts = (column.astype(np.int32) for column in (codeword, label, images, patches))
    return ClassCounts(codeword, label, images, counts, lift.astype(np.float32), is_evidence, sizes, images_with)


def class_shares(codes: Array, labels: Array, num_codewords: int, classes: Sequence[str]) -> dict[int, ClassShare]:
    """Return the class with the highest lift that is evidence (see `class_counts`), by codeword; `labels` is int (N,).

    A codeword without such a class is left out.
    """
    return class_counts(occurrences(codes, num_codewords), labels, len(classes)).shares(classes)
