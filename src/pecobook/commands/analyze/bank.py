"""Usage and galleries of a whole token bank: its files are read in order and never held, so a million images will do.

V views of each image, h w latent grid, K codewords.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pecobook.analysis.codewords import CodeUsage, Gallery, GalleryPatch, GalleryRow, patch_window, usage_of_counts
from pecobook.data.decode import BadImage
from pecobook.data.named_views import NamedViews
from pecobook.data.sampler import key, mix_all
from pecobook.data.source import ImageSource
from pecobook.data.stream import Stream, collate
from pecobook.data.tokens import TokenBank
from pecobook.errors import DataError

_CHUNK = 2**22  # codes looked at together


@dataclass(frozen=True)
class Occurrences:
    """Where a codeword occurs: how often, in how many images, and a few places drawn at random."""

    codeword: int
    count: int
    images: int
    drawn: tuple[tuple[int, int, int, int], ...]
    """(image, view, row, column), one an image, in random order."""


def _chunks(bank: TokenBank) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint16]]]:
    """Numbers (n,) of images, and codes (n, V h w); without images that could not be read, whose codes mean nothing."""
    layout = bank.layouts["train"]
    each = layout.num_views * layout.grid[0] * layout.grid[1]
    step = max(_CHUNK // each, 1)
    for shard in range(layout.num_shards):
        codes, first = bank.shard("train", shard), layout.images_of(shard).start
        for start in range(0, len(codes), step):
            part = codes[start : start + step].reshape(-1, each)
            numbers = np.arange(first + start, first + start + len(part))
            whole = np.isin(numbers, bank.skipped, invert=True)
            yield numbers[whole], part[whole]


def bank_usage(bank: TokenBank, num_codewords: int) -> CodeUsage:
    """How the training images use the codebook.

    Raises:
        DataError: a file of the bank is damaged.
    """
    counts = np.zeros(num_codewords, dtype=np.int64)
    for _, codes in _chunks(bank):
        part = np.bincount(codes.reshape(-1), minlength=num_codewords)
        if len(part) > num_codewords:
            raise DataError(
                f"The token bank '{bank.folder}' holds code {len(part) - 1}, and there are {num_codewords} codewords."
            )
        counts += part
    return usage_of_counts(counts)


def find_occurrences(
    bank: TokenBank, codewords: Sequence[int], num_codewords: int, *, patches: int, seed: int
) -> list[Occurrences]:
    """Where codewords occur among all training images.

    An image's rank is a hash of (seed, codeword, image), and the `patches` lowest are drawn: what is drawn for one
    codeword depends on no other, on no order of reading, and needs no list of all its places.
    """
    layout = bank.layouts["train"]
    shape = (layout.num_views, *layout.grid)
    numbers = np.full(num_codewords, len(codewords), dtype=np.uint16)
    numbers[list(codewords)] = np.arange(len(codewords))
    found = [_Draw(key(seed, codeword), patches) for codeword in codewords]
    for images, codes in _chunks(bank):
        number = numbers[codes]
        rows, places = np.nonzero(number < len(codewords))
        which = number[rows, places]
        for index, draw in enumerate(found):
            mine = which == index
            draw.add(images[rows[mine]], places[mine])
    return [
        Occurrences(
            codeword, draw.count, draw.images, tuple((image, *_unravel(place, shape)) for _, image, place in draw.kept)
        )
        for codeword, draw in zip(codewords, found, strict=True)
    ]


def _unravel(place: int, shape: tuple[int, ...]) -> tuple[int, int, int]:
    view, row, column = np.unravel_index(place, shape)
    return int(view), int(row), int(column)


class _Draw:
    """The images of least rank that hold a codeword, each with one place of it."""

    def __init__(self, draw_key: int, size: int) -> None:
        self.key, self.size, self.count, self.images = np.uint64(draw_key), size, 0, 0
        self.kept: list[tuple[int, int, int]] = []  # (rank, image, place), in order

    def add(self, images: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        """Places of images, in order of the image, all of an image at once."""
        if len(images) == 0:
            return
        self.count += len(images)
        starts = np.flatnonzero(np.diff(images, prepend=-1))
        self.images += len(starts)
        lengths = np.diff(starts, append=len(images))
        ranks = mix_all(images[starts].astype(np.uint64) ^ self.key)
        lowest = np.argsort(ranks, kind="stable")[: self.size]
        # Which of an image's places is shown: another hash of the same.
        chosen = starts[lowest] + (mix_all(ranks[lowest]) % lengths[lowest].astype(np.uint64)).astype(np.int64)
        new = zip(ranks[lowest].tolist(), images[chosen].tolist(), places[chosen].tolist(), strict=True)
        self.kept = sorted([*self.kept, *new])[: self.size]


def bank_gallery(
    bank: TokenBank, source: ImageSource, found: Sequence[Occurrences], *, context: float = 1.0
) -> Gallery:
    """Pictures of places: the views that were tokenized, made again, without images that cannot be read any more."""
    rows = []
    for places in found:
        patches = []
        for image, view, row, column in places.drawn:
            try:
                pixels = view_of(bank.config, source, image, view)
            except BadImage:
                continue
            window, box = patch_window(pixels, bank.layouts["train"].grid, row, column, context)
            patches.append(GalleryPatch(image, row, column, window, box))
        rows.append(GalleryRow(places.codeword, places.count, places.images, tuple(patches)))
    return Gallery(tuple(rows))


def view_of(config: dict[str, Any], source: ImageSource, image: int, view: int) -> Any:
    """Returns a view of an image as the bank defines it: float (3, S, S) in [0, 1]. Raises BadImage."""
    views = NamedViews.of_bank(config)
    sample = Stream(source, views.train, views.seed).views(image, [view])
    return views.pixels(collate(sample), training=True)[0]
