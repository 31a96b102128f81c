"""Masks for masked image modelling: the patches that are hidden from the model.

True means masked. A mask hides exactly `num_masked` patches, at least one and not all, so shapes are static.

A mask under construction is an integer, `bits`: patch (row, column) is bit row x columns + column. Adding a block to an
integer takes a quarter of the time of tensor operations, of which a mask would need dozens.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from pecobook.data.sampler import key
from pecobook.errors import ConfigError
from pecobook.settings.pretrain import MaskConfig

_NUM_ATTEMPTS = 10
_LOG_ASPECT = math.log(1 / 0.3)


def blockwise_mask(
    grid: tuple[int, int], *, num_masked: int, min_block: int = 16, generator: torch.Generator | None = None
) -> Tensor:
    """Mask rectangular blocks until exactly `num_masked` patches are masked (BEiT, arXiv 2106.08254, algorithm 1).

    The area of each block is uniform between `min_block` and the number of patches still to mask (also if that number
    is below `min_block`, as in BEiT's code). The aspect ratio is log-uniform in [0.3, 1 / 0.3]. BEiT stops after ten
    consecutive attempts that add nothing, and so masks 64 to 75 of 75 patches. Here the few missing patches are drawn
    from the border of the masked area, so that the count is exact and the blocks remain blocks.

    Args:
        grid: rows and columns of patches.
        num_masked: number of patches to mask, above 0 and below rows x columns.
        min_block: minimum area of a block, in patches.
        generator: source of randomness; None uses torch's global generator.

    Returns:
        bool (rows, columns), True where masked.
    """
    _check_num_masked(grid, num_masked)
    bits = count = 0
    while count < num_masked:
        bits, added = add_block(bits, grid, num_masked - count, min_block, generator)
        if added == 0:
            break
        count += added
    for _ in range(num_masked - count):
        bits = add_border_patch(bits, grid, generator)
    return to_mask(bits, grid)


def random_mask(grid: tuple[int, int], *, num_masked: int, generator: torch.Generator | None = None) -> Tensor:
    """Mask `num_masked` patches drawn without replacement: bool (rows, columns), True where masked."""
    _check_num_masked(grid, num_masked)
    mask = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    mask[torch.randperm(mask.numel(), generator=generator)[:num_masked]] = True
    return mask.view(grid)


def _check_num_masked(grid: tuple[int, int], num_masked: int) -> None:
    if not 0 < num_masked < grid[0] * grid[1]:
        raise ConfigError(f"--num-masked must lie between 1 and {grid[0] * grid[1] - 1}, not {num_masked}.")


def to_mask(bits: int, grid: tuple[int, int]) -> Tensor:
    """Convert bits to a mask, bool (rows, columns)."""
    size = grid[0] * grid[1]
    packed = np.frombuffer(bits.to_bytes(-(-size // 8), "little"), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(packed, count=size, bitorder="little").view(np.bool_)).view(grid)


def add_block(
    bits: int, grid: tuple[int, int], remaining: int, min_block: int, generator: torch.Generator | None
) -> tuple[int, int]:
    """Add one block; return the bits and the number of patches that it newly masked, 0 if no attempt fitted."""
    rows, columns = grid
    draws = torch.rand(_NUM_ATTEMPTS, 4, generator=generator, dtype=torch.float64).tolist()
    for area_draw, aspect_draw, row_draw, column_draw in draws:
        area = min_block + area_draw * (remaining - min_block)
        aspect = math.exp((2 * aspect_draw - 1) * _LOG_ASPECT)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < rows and 0 < width < columns):
            continue
        top = int(row_draw * (rows - height + 1))
        left = int(column_draw * (columns - width + 1))
        block = _block(height, width, columns) << (top * columns + left)
        added = (block & ~bits).bit_count()
        if 0 < added <= remaining:
            return bits | block, added
    return bits, 0


@functools.lru_cache(maxsize=4096)
def _block(height: int, width: int, columns: int) -> int:
    """Return the bits of a block in the first corner."""
    return sum(((1 << width) - 1) << (row * columns) for row in range(height))


def add_border_patch(bits: int, grid: tuple[int, int], generator: torch.Generator | None) -> int:
    """Mask one visible patch next to a masked patch (any visible patch if nothing is masked yet)."""
    rows, columns = grid
    every, first_column = _block(rows, columns, columns), _block(rows, 1, columns)
    neighbours = bits << columns | bits >> columns
    neighbours |= (bits & ~(first_column << (columns - 1))) << 1 | (bits & ~first_column) >> 1
    candidates = (neighbours & ~bits & every) or (~bits & every)
    choice = int(torch.randint(candidates.bit_count(), (1,), generator=generator))
    for _ in range(choice):
        candidates &= candidates - 1  # without its lowest bit
    return bits | (candidates & -candidates)


def make_mask(view_key: int, grid: tuple[int, int], config: MaskConfig) -> Tensor:
    """Draw the mask of a view: bool (h, w)."""
    generator = torch.Generator().manual_seed(key(view_key, 2) >> 1)
    if config.kind == "random":
        return random_mask(grid, num_masked=config.num_masked, generator=generator)
    return blockwise_mask(grid, num_masked=config.num_masked, min_block=config.min_block, generator=generator)
