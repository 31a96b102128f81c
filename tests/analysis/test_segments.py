from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassJaccardIndex

from pecobook.analysis.segments import count_pixels, intersection_over_union, overlay, palette, scores
from pecobook.data.dense.segmentation_classes import IGNORE


def test_scores__by_hand() -> None:
    truth = torch.tensor([[0, 0, 1, 1], [0, 2, 2, IGNORE]], dtype=torch.int16)
    predicted = torch.tensor([[0, 1, 1, 1], [0, 2, 0, 2]])
    counts = count_pixels(predicted, truth, 4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    # Intersections 2, 2, 1; unions 3 + 3 - 2, 2 + 3 - 2, 2 + 1 - 1; class 3 does not occur.
    each = intersection_over_union(counts)
    assert each[:3].tolist() == pytest.approx([2 / 4, 2 / 3, 1 / 2])
    assert each[3].isnan()
    assert scores(counts) == pytest.approx(
        {
            "miou": 100 * (2 / 4 + 2 / 3 + 1 / 2) / 3,
            "mean_accuracy": 100 * (2 / 3 + 1 + 1 / 2) / 3,
            "pixel_accuracy": 100 * 5 / 7,
        }
    )


@given(st.integers(2, 6), st.integers(0, 10_000))
def test_intersection_over_union__is_that_of_torchmetrics(classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(-1, classes, (9, 11), generator=generator)
    predicted = torch.randint(0, classes, (9, 11), generator=generator)
    each = intersection_over_union(count_pixels(predicted, truth, classes))
    oracle = MulticlassJaccardIndex(classes, average="none", ignore_index=IGNORE)(predicted[None], truth[None])
    assert torch.allclose(each.nan_to_num().float(), oracle)


def test_overlay__paints_classes_and_leaves_the_rest() -> None:
    image = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    classes = torch.tensor([[0, 1], [IGNORE, 1]])
    painted = overlay(image, classes, strength=1.0)
    assert painted[:, 0, 0].tolist() == palette(2)[0].tolist()
    assert painted[:, 1, 1].tolist() == palette(2)[1].tolist()
    assert painted[:, 1, 0].tolist() == [100, 100, 100]
    assert torch.equal(overlay(image, classes, strength=0.0), image)


def test_palette__colours_differ() -> None:
    colours = palette(40).astype(int)
    distance = np.abs(colours[:, None] - colours[None]).sum(2) + 1000 * np.eye(40)
    assert distance.min() > 15
    assert palette(0).shape == (0, 3)
