"""What a step keeps of its vectors when its next micro-batch arrives: sums by codeword, and a sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pecobook.utils.distributed import world_size


class Weighted(NamedTuple):
    """The contribution of some vectors to the averages: sums of vectors with one code, and how many each stands for."""

    sums: Tensor  # (n, D)
    codes: Tensor  # int64 (n,)
    counts: Tensor  # (n,)


def merged(parts: Sequence[Weighted], num_codewords: int) -> Weighted:
    """Return the sums of all parts or, if these are more than K, a single one per codeword."""
    if sum(len(part.codes) for part in parts) <= num_codewords:
        return Weighted(*map(torch.cat, zip(*parts, strict=True)))
    like = parts[0].sums
    sums, counts = like.new_zeros(num_codewords, like.shape[1]), like.new_zeros(num_codewords)
    for part in parts:
        sums.index_add_(0, part.codes, part.sums)
        counts.index_add_(0, part.codes, part.counts)
    return Weighted(sums, torch.arange(num_codewords, device=sums.device), counts)


class Sample:
    """Every s-th vector of a step: at least `size` (if there are that many) and less than twice that on all ranks.

    s is a power of two, so that the sample of a part can be thinned to that of the whole: it depends only on the number
    of vectors, not on the number of micro-batches or, with whole multiples of s on each, of ranks.
    """

    def __init__(self, size: int) -> None:
        self.size, self.stride, self.seen = size, 1, 0
        self.rows = torch.empty(0)

    def add(self, vectors: Tensor) -> None:
        """Add vectors (N, D)."""
        new = vectors[-self.seen % self.stride :: self.stride]
        self.rows = torch.cat([self.rows, new]) if self.seen else new
        self.seen += len(vectors)
        while len(self.rows) > 1 and len(self.rows) * world_size() >= 2 * self.size:
            self.rows, self.stride = self.rows[::2], 2 * self.stride
