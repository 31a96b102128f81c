"""The order of images and the randomness of views, as pure functions without state, so a resumed run restores no state.

A training run reads one endless stream of positions 0, 1, 2, ... Step `s` with global batch size `B` reads the
positions [s B, (s + 1) B), for any number of ranks, workers or accumulation steps. With n images, position `p` stands
for epoch `p // n` and image `permute(p % n, n, key(seed, epoch))`; the epoch is also the number of the image's view.

The permutation is computed, not stored, so it also serves a billion images: a four-round Feistel network over the next
power of four is iterated until the result is below `n` (Black and Rogaway, "Ciphers with arbitrary finite domains",
2002). `permute_windows` keeps neighbours together, for storage that reads single images slowly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_RUNS = 32
"""Number of runs of neighbouring images that are shuffled together."""


def splitmix64(value: int) -> int:
    """Hash a 64-bit integer to a 64-bit integer (the output function of the generator splitmix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key(*parts: int) -> int:
    """Hash a sequence of integers to one 64-bit key."""
    value = 0
    for part in parts:
        value = splitmix64(value ^ (part & _MASK))
    return value


def splitmix64_array(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Apply `splitmix64` to every element of an array."""
    value = values + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def uniforms(seed_key: int, count: int) -> npt.NDArray[np.float64]:
    """Return `count` uniform numbers in [0, 1), shape (count,), as a pure function of the key."""
    value = splitmix64_array(np.uint64(seed_key) + np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (value >> np.uint64(11)).astype(np.float64) * 2.0**-53


def uniform(seed_key: int, number: int) -> float:
    """Return `uniforms(seed_key, number + 1)[number]`, faster where few numbers are needed."""
    return (splitmix64((seed_key + number * 0x9E3779B97F4A7C15) & _MASK) >> 11) * 2.0**-53


def permute(index: int, size: int, permutation_key: int) -> int:
    """Map `index` with a keyed permutation of range(size)."""
    if not 0 <= index < size:
        raise IndexError(f"index {index} is outside range({size})")
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    half_mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & half_mask
        for round_number in range(4):
            left, right = right, left ^ (splitmix64(permutation_key ^ splitmix64(right * 4 + round_number)) & half_mask)
        index = (left << half_bits) | right
        if index < size:
            return index


def permute_windows(index: int, size: int, window: int, permutation_key: int) -> int:
    """Map `index` by a keyed permutation of range(size) that is nearly sequential, for slow storage.

    Each `window` consecutive indices stand for at most 32 runs of neighbouring numbers, from all over the range, whose
    numbers are shuffled together: a reader that holds a window reads each run once and from end to end. The runs start
    at other places for each key. A window of 0 shuffles all numbers together, as `permute` does.
    """
    if not window:
        return permute(index, size, permutation_key)
    runs = min(_RUNS, window)
    length = window // runs
    number, inside = divmod(index, runs * length)
    first = number * runs * length
    inside = permute(inside, min(runs * length, size - first), key(permutation_key, number))
    run, offset = divmod(first + inside, length)
    if run < size // length:  # the remaining numbers form the last run
        run = permute(run, size // length, permutation_key)
    return (run * length + offset + permutation_key) % size


def fixed_permutation(position: int, size: int) -> int:
    """Map `position` with a permutation of range(size) that no seed changes; the first images are a fair sample."""
    return permute(position, size, key(0, 1))


class BatchPositions(Sequence[list[int]]):
    """The positions that one rank reads from `start_step` up to `stop_step`, as one list per micro-batch.

    A global batch is divided by micro-batch, and each micro-batch by rank. The global batch therefore holds the same
    images for any number of ranks and accumulation steps. A DataLoader accepts this class as its `batch_sampler`.
    """

    def __init__(
        self, *, start_step: int, stop_step: int, batch_size: int, micro_batch_size: int, rank: int, world_size: int
    ) -> None:
        if batch_size % (micro_batch_size * world_size):
            raise ValueError(f"{batch_size} is not a multiple of {micro_batch_size} x {world_size}")
        self.start_step, self.stop_step, self.batch_size = start_step, stop_step, batch_size
        self.micro_batch_size, self.rank, self.world_size = micro_batch_size, rank, world_size
        self.accumulation = batch_size // (micro_batch_size * world_size)

    def __len__(self) -> int:
        return (self.stop_step - self.start_step) * self.accumulation

    def __getitem__(self, number: int) -> list[int]:  # type: ignore[override]
        if not 0 <= number < len(self):
            raise IndexError(number)
        step, micro = divmod(number, self.accumulation)
        first = (self.start_step + step) * self.batch_size
        first += (micro * self.world_size + self.rank) * self.micro_batch_size
        return list(range(first, first + self.micro_batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        return (self[number] for number in range(len(self)))
