"""Masks for masked image modelling: the patches that are hidden from the model.

True means masked. A mask hides exactly `num_masked` patches, at least one and not all, so shapes are static.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pecobook.errors import ConfigError

_NUM_ATTEMPTS = 10
_MIN_ASPECT = 0.3


def blockwise_mask(
    grid: tuple[int, int], *, num_masked: int, min_block: int = 16, generator: torch.Generator | None = None
) -> Tensor:
    """Mask rectangular blocks until exactly `num_masked` patches are masked (BEiT, arXiv 2106.08254, algorithm 1).

    The area of each block is uniform between `min_block` and the number of patches still to mask (also if that number
    is below `min_block`, as in BEiT's code). The aspect ratio is log-uniform in [0.3, 1 / 0.3]. BEiT stops after ten
    attempts in a row that add nothing, which masks 64 to 75 of 75 patches. Here the few missing patches are then drawn
    from the border of the masked area, so that the count is exact and the blocks remain blocks.

    Args:
        grid: rows and columns of patches.
        num_masked: number of patches to mask, above 0 and below rows x columns.
        min_block: minimum area of a block, in patches.
        generator: source of randomness; None uses torch's global generator.

    Returns:
        bool (rows, columns), True where masked.
    """
    rows, columns = grid
    _check_num_masked(grid, num_masked)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    count = 0
    while count < num_masked:
        added = add_block(mask, num_masked - count, min_block, generator)
        if added == 0:
            break
        count += added
    while count < num_masked:
        add_border_patch(mask, generator)
        count += 1
    return mask


def random_mask(grid: tuple[int, int], *, num_masked: int, generator: torch.Generator | None = None) -> Tensor:
    """Mask `num_masked` patches drawn without replacement: bool (rows, columns), True where masked."""
    _check_num_masked(grid, num_masked)
    mask = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    mask[torch.randperm(mask.numel(), generator=generator)[:num_masked]] = True
    return mask.view(grid)


def _check_num_masked(grid: tuple[int, int], num_masked: int) -> None:
    if not 0 < num_masked < grid[0] * grid[1]:
        raise ConfigError(f"--num-masked must lie between 1 and {grid[0] * grid[1] - 1}, not {num_masked}.")


def add_block(mask: Tensor, remaining: int, min_block: int, generator: torch.Generator | None) -> int:
    """Mask one block in place; return the number of patches that it newly masked, 0 if no attempt fitted."""
    rows, columns = mask.shape
    draws = torch.rand(_NUM_ATTEMPTS, 4, generator=generator, dtype=torch.float64).tolist()
    for area_draw, aspect_draw, row_draw, column_draw in draws:
        area = min_block + area_draw * (remaining - min_block)
        aspect = math.exp((2 * aspect_draw - 1) * math.log(1 / _MIN_ASPECT))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < height < rows and 0 < width < columns):
            continue
        top = int(row_draw * (rows - height + 1))
        left = int(column_draw * (columns - width + 1))
        block = mask[top : top + height, left : left + width]
        added = height * width - int(block.sum())
        if 0 < added <= remaining:
            block.fill_(True)
            return added
    return 0


def add_border_patch(mask: Tensor, generator: torch.Generator | None) -> None:
    """Mask one visible patch next to a masked patch (any visible patch if nothing is masked yet)."""
    has_masked_neighbour = torch.zeros_like(mask)
    has_masked_neighbour[1:] |= mask[:-1]
    has_masked_neighbour[:-1] |= mask[1:]
    has_masked_neighbour[:, 1:] |= mask[:, :-1]
    has_masked_neighbour[:, :-1] |= mask[:, 1:]
    candidates = (has_masked_neighbour & ~mask).flatten().nonzero()[:, 0]
    if len(candidates) == 0:
        candidates = (~mask).flatten().nonzero()[:, 0]
    choice = torch.randint(len(candidates), (1,), generator=generator)
    mask.view(-1)[candidates[choice]] = True
