"""Masks for masked image modelling: which patches the model does not see.

True means masked. A mask holds exactly `num_masked` patches, never none and never all, so shapes are static.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pecobook.errors import ConfigError

_TRIES = 10
_ASPECT = 0.3


def blockwise_mask(
    grid: tuple[int, int], *, num_masked: int, min_block: int = 16, generator: torch.Generator | None = None
) -> Tensor:
    """Mask rectangles until exactly `num_masked` patches are hidden (BEiT, arXiv 2106.08254, algorithm 1).

    Each rectangle's area is uniform between min_block and the patches still to mask (also when these are fewer than
    min_block, as in BEiT's code), its aspect ratio log-uniform in [0.3, 1 / 0.3]. BEiT stops when ten tries in a row
    add nothing, which leaves 64 to 75 of 75 masked; here the few missing patches are then drawn from the border of what
    is masked, so that the count is exact and blocks stay blocks.

    Args:
        grid: rows and columns of patches.
        num_masked: patches to mask, above 0 and below rows x columns.
        min_block: least area of a rectangle, in patches.
        generator: source of randomness; None uses torch's global one.

    Returns:
        bool (rows, columns), True where masked.
    """
    rows, columns = grid
    _check(grid, num_masked)
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    count = 0
    while count < num_masked:
        added = _add_block(mask, num_masked - count, min_block, generator)
        if added == 0:
            break
        count += added
    while count < num_masked:
        _add_border_patch(mask, generator)
        count += 1
    return mask


def random_mask(grid: tuple[int, int], *, num_masked: int, generator: torch.Generator | None = None) -> Tensor:
    """Mask `num_masked` patches drawn without replacement: bool (rows, columns), True where masked."""
    _check(grid, num_masked)
    mask = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    mask[torch.randperm(mask.numel(), generator=generator)[:num_masked]] = True
    return mask.view(grid)


def _check(grid: tuple[int, int], num_masked: int) -> None:
    if not 0 < num_masked < grid[0] * grid[1]:
        raise ConfigError(f"--num-masked must lie between 1 and {grid[0] * grid[1] - 1}, not {num_masked}.")


def _add_block(mask: Tensor, remaining: int, min_block: int, generator: torch.Generator | None) -> int:
    """Mask one rectangle in place; returns how many patches it newly masked, 0 when no try fitted."""
    rows, columns = mask.shape
    draws = torch.rand(_TRIES, 4, generator=generator, dtype=torch.float64).tolist()
    for area_draw, aspect_draw, row_draw, column_draw in draws:
        area = min_block + area_draw * (remaining - min_block)
        aspect = math.exp((2 * aspect_draw - 1) * math.log(1 / _ASPECT))
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


def _add_border_patch(mask: Tensor, generator: torch.Generator | None) -> None:
    """Mask one visible patch beside a masked one (any visible patch when nothing is masked yet)."""
    near = torch.zeros_like(mask)
    near[1:] |= mask[:-1]
    near[:-1] |= mask[1:]
    near[:, 1:] |= mask[:, :-1]
    near[:, :-1] |= mask[:, 1:]
    candidates = (near & ~mask).flatten().nonzero()[:, 0]
    if len(candidates) == 0:
        candidates = (~mask).flatten().nonzero()[:, 0]
    choice = torch.randint(len(candidates), (1,), generator=generator)
    mask.view(-1)[candidates[choice]] = True
