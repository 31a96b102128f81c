"""Codebook usage and patch galleries of a whole token bank.

The bank's files are read one after another and are not kept in memory, so a bank may contain millions of images.

Shapes: V views of each image, latent grid (h, w), K codewords.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pecobook.analysis.codewords import CodeUsage, GalleryRow, gallery_patch, usage_from_counts
from pecobook.data.decode import BadImage
from pecobook.data.sampler import key, splitmix64_array
from pecobook.data.source import ImageSource
from pecobook.data.stream import Stream, collate
from pecobook.data.tokens import Codes, TokenBank
from pecobook.data.views import NamedViews
from pecobook.errors import DataError

CHUNK = 2**22  # codes that are processed at once


class Occurrences:
    """A codeword's occurrences in all views of all images; the images with the lowest ranks are drawn."""

    def __init__(self, codeword: int, shape: tuple[int, ...], patches: int, seed: int) -> None:
        self.codeword, self.images = codeword, 0
        self._shape, self._patches, self._key = shape, patches, np.uint64(key(seed, codeword))
        self._counts = np.zeros(math.prod(shape), dtype=np.int64)
        self._drawn: list[tuple[int, int, int]] = []  # (rank, image, position), sorted

    @property
    def positions(self) -> NDArray[np.int64]:
        """Number of occurrences at each position of the code grid, (h, w)."""
        return self._counts.reshape(self._shape).sum(0)  # type: ignore[no-any-return]

    @property
    def drawn(self) -> tuple[tuple[int, ...], ...]:
        """(image, view, row, column), one position per image, in random order."""
        return tuple((image, *map(int, np.unravel_index(place, self._shape))) for _, image, place in self._drawn)

    def add(self, images: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
        """Add positions (n,) in images (n,), sorted by image; one call must contain all positions of an image."""
        if len(images) == 0:
            return
        self._counts += np.bincount(positions, minlength=len(self._counts))
        starts = np.flatnonzero(np.diff(images, prepend=-1))
        self.images += len(starts)
        lengths = np.diff(starts, append=len(images))
        ranks = splitmix64_array(images[starts].astype(np.uint64) ^ self._key)
        lowest = np.argsort(ranks, kind="stable")[: self._patches]
        # A second hash chooses the position within the image.
        chosen = starts[lowest] + (splitmix64_array(ranks[lowest]) % lengths[lowest].astype(np.uint64)).astype(np.int64)
        new = zip(ranks[lowest].tolist(), images[chosen].tolist(), positions[chosen].tolist(), strict=True)
        self._drawn = sorted([*self._drawn, *new])[: self._patches]


def _chunks(bank: TokenBank) -> Iterator[tuple[NDArray[np.int64], Codes]]:
    """Yield indices (n,) and codes (n, V h w) of images, without unreadable images, whose codes have no meaning."""
    layout = bank.layouts["train"]
    codes_per_image = layout.num_views * layout.grid[0] * layout.grid[1]
    step = max(CHUNK // codes_per_image, 1)
    for shard in range(layout.num_shards):
        codes, first = bank.shard("train", shard), layout.images_of(shard).start
        for start in range(0, len(codes), step):
            part = codes[start : start + step].reshape(-1, codes_per_image)
            indices = np.arange(first + start, first + start + len(part))
            readable = np.isin(indices, bank.skipped, invert=True)
            yield indices[readable], part[readable]


def bank_usage(bank: TokenBank, num_codewords: int) -> CodeUsage:
    """Measure how the training images use the codebook.

    Raises:
        DataError: a file of the bank is damaged.
    """
    counts = np.zeros(num_codewords, dtype=np.int64)
    for _, codes in _chunks(bank):
        chunk_counts = np.bincount(codes.reshape(-1), minlength=num_codewords)
        if len(chunk_counts) > num_codewords:
            raise DataError(
                f"The token bank '{bank.folder}' holds code {len(chunk_counts) - 1}, but there are only "
                f"{num_codewords} codewords."
            )
        counts += chunk_counts
    return usage_from_counts(counts)


def find_occurrences(
    bank: TokenBank, codewords: Sequence[int], num_codewords: int, *, patches: int, seed: int
) -> list[Occurrences]:
    """Find the occurrences of codewords in all training images.

    An image's rank is a hash of (seed, codeword, image), and the images with the `patches` lowest ranks are drawn.
    Which images are drawn for a codeword therefore depends neither on other codewords nor on the reading order, and no
    list of all positions is needed.
    """
    layout = bank.layouts["train"]
    shape = (layout.num_views, *layout.grid)
    number_of = np.full(num_codewords, len(codewords), dtype=np.uint16)  # index of each codeword in `codewords`
    number_of[list(codewords)] = np.arange(len(codewords))
    found = [Occurrences(codeword, shape, patches, seed) for codeword in codewords]
    for images, codes in _chunks(bank):
        numbers = number_of[codes]
        rows, positions = np.nonzero(numbers < len(codewords))
        numbers = numbers[rows, positions]
        for number, occurrences in enumerate(found):
            matches = numbers == number
            occurrences.add(images[rows[matches]], positions[matches])
    return found


def bank_gallery(bank: TokenBank, source: ImageSource, occurrences: Sequence[Occurrences]) -> list[GalleryRow]:
    """Cut the drawn patches out of the tokenized views; images that are no longer readable are left out."""
    rows = []
    for occurrence in occurrences:
        patches = []
        for image, view, row, column in occurrence.drawn:
            try:
                pixels = view_of(bank.config, source, image, view)
            except BadImage:
                continue
            patches.append(gallery_patch(image, pixels, bank.layouts["train"].grid, row, column))
        rows.append(GalleryRow(occurrence.codeword, occurrence.images, occurrence.positions, tuple(patches)))
    return rows


def view_of(config: dict[str, Any], source: ImageSource, image: int, view: int) -> Any:
    """Returns a view of an image as the bank defines it: float (3, S, S) in [0, 1]. Raises BadImage."""
    views = NamedViews.of_bank(config)
    sample = Stream(source, views.train, views.seed).views(image, [view])
    return views.pixels(collate(sample), training=True)[0]
