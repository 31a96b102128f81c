"""Masks have an exact count and BEiT's blocks."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pecobook.data import masking
from pecobook.data.masking import blockwise_mask, random_mask, to_mask
from pecobook.errors import ConfigError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def requests(draw: st.DrawFn) -> tuple[tuple[int, int], int, int, int]:
    """Draw a grid, a number of masked patches, a minimum block area and a seed."""
    grid = draw(st.integers(4, 20)), draw(st.integers(4, 20))
    return grid, draw(st.integers(1, grid[0] * grid[1] - 1)), draw(st.integers(1, 40)), draw(st.integers(0, 2**31))


@settings(max_examples=150, deadline=None)
@given(requests())
def test_blockwise_mask__masks_exactly_num_masked_patches(request: tuple[tuple[int, int], int, int, int]) -> None:
    grid, num_masked, min_block, seed = request
    mask = blockwise_mask(grid, num_masked=num_masked, min_block=min_block, generator=seeded(seed))
    assert mask.dtype == torch.bool
    assert tuple(mask.shape) == grid
    assert mask.sum() == num_masked
    again = blockwise_mask(grid, num_masked=num_masked, min_block=min_block, generator=seeded(seed))
    assert torch.equal(mask, again)


def plain_mask(grid: tuple[int, int], num_masked: int, min_block: int, generator: torch.Generator) -> Tensor:
    """Return the mask of the same random numbers with a tensor in place of bits, as simple as it can be written."""
    mask = torch.zeros(grid, dtype=torch.bool)
    added = -1
    while added and mask.sum() < num_masked:
        left, added = num_masked - int(mask.sum()), 0
        for area, aspect, row, column in torch.rand(10, 4, generator=generator, dtype=torch.float64).tolist():
            pixels, ratio = min_block + area * (left - min_block), math.exp((2 * aspect - 1) * math.log(1 / 0.3))
            height, width = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
            if 0 < height < grid[0] and 0 < width < grid[1]:
                top, start = int(row * (grid[0] - height + 1)), int(column * (grid[1] - width + 1))
                block = mask[top : top + height, start : start + width]
                added = int((~block).sum())
                if 0 < added <= left:
                    block.fill_(True)
                    break
                added = 0
    while mask.sum() < num_masked:
        padded = torch.nn.functional.pad(mask, (1, 1, 1, 1))
        near = padded[2:, 1:-1] | padded[:-2, 1:-1] | padded[1:-1, 2:] | padded[1:-1, :-2]
        places = (near & ~mask if (near & ~mask).any() else ~mask).nonzero().tolist()
        row, column = places[int(torch.randint(len(places), (1,), generator=generator))]
        mask[row, column] = True
    return mask


@settings(max_examples=200, deadline=None)
@given(requests())
def test_blockwise_mask__is_that_of_a_plain_implementation(request: tuple[tuple[int, int], int, int, int]) -> None:
    grid, num_masked, min_block, seed = request
    mask = blockwise_mask(grid, num_masked=num_masked, min_block=min_block, generator=seeded(seed))
    assert torch.equal(mask, plain_mask(grid, num_masked, min_block, seeded(seed)))


@settings(max_examples=50, deadline=None)
@given(requests())
def test_random_mask__masks_exactly_num_masked_patches(request: tuple[tuple[int, int], int, int, int]) -> None:
    grid, num_masked, _, seed = request
    mask = random_mask(grid, num_masked=num_masked, generator=seeded(seed))
    assert mask.dtype == torch.bool
    assert tuple(mask.shape) == grid
    assert mask.sum() == num_masked
    assert torch.equal(mask, random_mask(grid, num_masked=num_masked, generator=seeded(seed)))


@pytest.mark.parametrize("function", [blockwise_mask, random_mask])
def test_masks__differ_by_draw_and_leave_torch_alone_with_a_generator(function: Callable[..., Tensor]) -> None:
    before = torch.get_rng_state()
    generator = seeded(0)
    masks = {tuple(function((14, 14), num_masked=75, generator=generator).flatten().tolist()) for _ in range(20)}
    assert len(masks) == 20
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_masked", [-1, 0, 196, 197])
def test_masks__refuse_to_be_empty_or_full(num_masked: int) -> None:
    for function in (blockwise_mask, random_mask):
        with pytest.raises(ConfigError, match=f"--num-masked must lie between 1 and 195, not {num_masked}"):
            function((14, 14), num_masked=num_masked)


def test_random_mask__is_uniform() -> None:
    generator = seeded(0)
    share = torch.stack([random_mask((4, 5), num_masked=8, generator=generator) for _ in range(4000)]).float().mean(0)
    torch.testing.assert_close(share, torch.full((4, 5), 0.4), atol=0.04, rtol=0)


# ------------------------------------------------------------------------------------------ against BEiT's algorithm


def beit_blocks(rng: random.Random, rows: int, columns: int, total: int, min_block: int) -> list[tuple[int, int, int]]:
    """Run algorithm 1 of BEiT (arXiv 2106.08254) as BEiT's code does: (newly masked, height, width) of each block."""
    hidden: set[tuple[int, int]] = set()
    blocks: list[tuple[int, int, int]] = []
    while len(hidden) < total:
        left = total - len(hidden)
        for _ in range(10):
            area = rng.uniform(min_block, left)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height >= rows or width >= columns:
                continue
            top, start = rng.randint(0, rows - height), rng.randint(0, columns - width)
            cells = {(r, c) for r in range(top, top + height) for c in range(start, start + width)} - hidden
            if 0 < len(cells) <= left:
                hidden |= cells
                blocks.append((len(cells), height, width))
                break
        else:
            break
    return blocks


def our_blocks(monkeypatch: pytest.MonkeyPatch, seed: int, number: int) -> list[list[tuple[int, int, int]]]:
    """Record the blocks that `blockwise_mask` adds, as (newly masked, height, width), without the border patches.

    Height and width are measured on the bounding box of the newly masked patches, which is certain to equal the block
    only for the first block.
    """
    masks: list[list[tuple[int, int, int]]] = []
    add = masking.add_block

    def recorded(bits: int, grid: tuple[int, int], *arguments: Any) -> tuple[int, int]:
        after, added = add(bits, grid, *arguments)
        if added:
            new = to_mask(after & ~bits, grid).nonzero()
            assert len(new) == added
            height, width = (new.max(0).values - new.min(0).values + 1).tolist()
            masks[-1].append((added, height, width))
        return after, added

    monkeypatch.setattr(masking, "add_block", recorded)
    generator = seeded(seed)
    for _ in range(number):
        masks.append([])
        blockwise_mask((14, 14), num_masked=75, min_block=16, generator=generator)
    return masks


def test_blockwise_mask__has_beits_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    number = 2500
    rng = random.Random(0)
    theirs = [beit_blocks(rng, 14, 14, 75, 16) for _ in range(number)]
    ours = our_blocks(monkeypatch, 0, number)

    def summary(masks: list[list[tuple[int, int, int]]]) -> dict[str, float]:
        counts = np.array([sum(block[0] for block in blocks) for blocks in masks])
        first = np.array([blocks[0] for blocks in masks])
        return {
            "complete": float((counts == 75).mean()),
            "masked": float(counts.mean()),
            "blocks": float(np.mean([len(blocks) for blocks in masks])),
            "newly masked": float(np.mean([block[0] for blocks in masks for block in blocks])),
            "last block": float(np.mean([blocks[-1][0] for blocks in masks])),
            "first area": float(first[:, 0].mean()),
            "first elongation": float(np.abs(np.log(first[:, 1] / first[:, 2])).mean()),
            "first tall": float((first[:, 1] > first[:, 2]).mean()),
        }

    # Five standard errors of the difference of two means of 2,500.
    tolerance = {
        "complete": 0.07,
        "masked": 0.15,
        "blocks": 0.2,
        "newly masked": 0.9,
        "last block": 1.0,
        "first area": 2.4,
        "first elongation": 0.05,
        "first tall": 0.07,
    }
    actual, expected = summary(ours), summary(theirs)
    for name, value in expected.items():
        assert actual[name] == pytest.approx(value, abs=tolerance[name]), name
    # The values of the published algorithm, from a run of 100,000 masks.
    assert actual["complete"] == pytest.approx(0.666, abs=0.05)
    assert actual["masked"] == pytest.approx(74.47, abs=0.12)


def test_blockwise_mask__no_block_spans_the_grid() -> None:
    for seed in range(300):
        for dimension, grid in ((1, (3, 30)), (0, (30, 3))):
            bits, _ = masking.add_block(0, grid, 40, 4, seeded(seed))
            assert to_mask(bits, grid).any(dimension).sum() < 3  # as in BEiT's code, which requires height < rows


def test_blockwise_mask__adds_missing_patches_next_to_masked_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    add_border_patch = masking.add_border_patch
    num_added = 0

    def checked(bits: int, grid: tuple[int, int], generator: torch.Generator | None) -> int:
        nonlocal num_added
        after, before = add_border_patch(bits, grid, generator), to_mask(bits, grid)
        ((row, column),) = to_mask(after & ~bits, grid).nonzero().tolist()
        neighbours = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        assert any(before[r, c] for r, c in neighbours if 0 <= r < 14 and 0 <= c < 14)
        num_added += 1
        return after

    monkeypatch.setattr(masking, "add_border_patch", checked)
    generator = seeded(0)
    for _ in range(100):
        blockwise_mask((14, 14), num_masked=75, generator=generator)
    assert num_added > 10


def test_blockwise_mask__starts_anywhere_when_no_block_fits() -> None:
    # 16 patches never fit into 4 rows and 4 columns when one row and one column must stay free.
    masks = [blockwise_mask((4, 4), num_masked=15, min_block=16, generator=seeded(seed)) for seed in range(200)]
    visible = torch.stack(masks).logical_not().sum(0)
    assert visible.sum() == 200
    assert (visible > 0).all()


def test_blockwise_mask__is_centred() -> None:
    generator = seeded(1)
    share = torch.stack([blockwise_mask((8, 8), num_masked=20, min_block=4, generator=generator) for _ in range(3000)])
    share = share.float().mean(0)
    for turned in (share.flip(0), share.flip(1), share.t()):
        torch.testing.assert_close(share, turned, atol=0.06, rtol=0)
