from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pecobook.data.dense.segmentation_classes import IGNORE
from pecobook.data.dense.views import resize_mask, segmentation_view

HOW: dict[str, Any] = {"size": 32, "most": 128, "scales": (0.5, 2.0), "max_share": 0.75}


def marked(height: int = 40, width: int = 56) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pixel's colour says its class: classes are blocks of 8 x 8 pixels."""
    rows, columns = torch.meshgrid(torch.arange(height) // 8, torch.arange(width) // 8, indexing="ij")
    classes = (3 * rows + columns) % 5
    return (classes * 50).to(torch.uint8).expand(3, -1, -1).contiguous(), classes.to(torch.int16)


@given(st.integers(0, 2**63))
def test_training_view__image_and_mask_move_together(key: int) -> None:
    image, mask = marked()
    view = segmentation_view(image, mask, key, **HOW)
    assert view["image"].shape == (3, 32, 32)
    assert view["mask"].shape == (32, 32)
    assert view["colour"].shape == (9,)
    inside = view["mask"] != IGNORE
    difference = (view["image"][0].float() / 50 - view["mask"].float()).abs()[inside]
    # Bicubic pixels differ from the nearest one along edges alone.
    assert float((difference < 0.3).float().mean()) > 0.55
    outside = view["image"][:, ~inside]
    if outside.numel():
        assert outside.float().std(1).max() == 0
        assert outside[:, 0].tolist() == [124, 116, 104]


def test_training_view__is_a_function_of_its_key() -> None:
    image, mask = marked()
    first, again, other = (segmentation_view(image, mask, key, **HOW) for key in (5, 5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["image"], other["image"])


def test_training_view__flips_half_of_them_and_scales_by_half_to_twice() -> None:
    mask = torch.zeros(64, 64, dtype=torch.int16)
    mask[:, 32:] = 1
    image = (mask * 200).to(torch.uint8).expand(3, -1, -1).contiguous()
    flips, sizes = [], []
    for key in range(200):
        view = segmentation_view(image, mask, key, size=32, most=128, scales=(0.5, 0.5), max_share=1.0)
        flips.append(bool(view["mask"][0, 0] == 1))
        sizes.append(int((view["mask"] != IGNORE).sum()))
    assert set(sizes) == {16 * 16}  # half of the test's size, the rest is grey
    assert 70 < sum(flips) < 130


def test_training_view__avoids_crops_of_one_class() -> None:
    mask = torch.zeros(128, 128, dtype=torch.int16)
    mask[:, 64:] = 1
    image = torch.zeros(3, 128, 128, dtype=torch.uint8)
    how: dict[str, Any] = {"size": 32, "most": 500, "scales": (3.0, 3.0)}
    varied = {
        share: np.mean(
            [
                len(set(segmentation_view(image, mask, key, **how, max_share=share)["mask"].flatten().tolist()))
                for key in range(60)
            ]
        )
        for share in (0.75, 1.0)
    }
    assert varied[0.75] > varied[1.0] + 0.1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 90), (300, 4), (33, 32)])
def test_views__of_strange_sizes(height: int, width: int) -> None:
    image, mask = torch.zeros(3, height, width, dtype=torch.uint8), torch.zeros(height, width, dtype=torch.int16)
    for key in range(5):
        assert segmentation_view(image, mask, key, **HOW)["mask"].shape == (32, 32)


def test_resize_mask__nearest() -> None:
    mask = torch.tensor([[1, 2], [3, 4]])
    assert resize_mask(mask, 4, 4).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert resize_mask(mask, 1, 1).tolist() == [[4]]
    expected = torch.nn.functional.interpolate(torch.arange(63.0).view(1, 1, 7, 9), (5, 4), mode="nearest-exact")
    assert torch.equal(resize_mask(torch.arange(63.0).view(7, 9), 5, 4), expected[0, 0])
