"""Information, purity and patch attributes, against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from pecobook.analysis.semantics import (
    entropy,
    information,
    joint_counts,
    mutual_information,
    patch_colours,
    patch_edges,
    patch_labels,
)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 9))
def test_mutual_information_equals_scikit_learn(seed: int, codes: int, values: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, codes, (20, 2, 3)), rng.integers(0, values, (20, 2, 3))
    nats = mutual_info_score(a.reshape(-1), b.reshape(-1))
    joint = joint_counts(a, b, codes, values)
    assert mutual_information(joint) == pytest.approx(nats / np.log(2), abs=1e-9)
    contingency = contingency_matrix(a.reshape(-1), b.reshape(-1))
    assert sorted(joint[joint > 0].tolist()) == sorted(contingency[contingency > 0].tolist())
    purity = 100 * contingency.max(1).sum() / contingency.sum()
    assert information(a, b, codes).purity == pytest.approx(purity)
    assert information(a, b, codes).chance == pytest.approx(100 * contingency.sum(0).max() / contingency.sum())


def test_information__of_codes_that_determine_the_values_and_of_random_codes() -> None:
    values = np.repeat(np.arange(4), 500)
    result = information(values * 2 + np.arange(2000) % 2, values, 8)
    assert result.share == pytest.approx(1, abs=0.02)
    assert result.bits == pytest.approx(2, abs=0.03)
    assert result.purity == 100
    # As many codes as a quarter of the patches: the plug-in estimate alone would say 1.5 bits.
    codes = np.random.default_rng(1).integers(0, 500, 2000)
    assert mutual_information(joint_counts(codes, values, 500, 4)) > 0.3
    assert information(codes, values, 500).share < 0.03


def test_information__of_codes_that_patches_of_an_image_share() -> None:
    rng = np.random.default_rng(0)
    labels = np.broadcast_to(rng.integers(0, 5, (200, 1, 1)), (200, 4, 4))
    image_codes = rng.integers(0, 64, (200, 3))  # each image has three codes
    codes = np.take_along_axis(image_codes[:, None], rng.integers(0, 3, (200, 4, 4)), axis=2)
    assert information(codes, labels, 64).share < 0.03
    result = information(labels * 10 + rng.integers(0, 10, labels.shape), labels, 50)
    assert result.share == pytest.approx(1)
    assert result.purity == 100
    assert result.chance <= result.null_purity < 60
    one_each = np.broadcast_to(np.arange(200)[:, None, None], labels.shape)  # one code per image
    assert information(one_each, labels, 200).share == 0


def test_entropy_in_bits() -> None:
    assert entropy(np.array([4, 4, 4, 4, 0])) == pytest.approx(2)
    assert entropy(np.array([9])) == 0


def test_patch_labels_are_those_of_the_image() -> None:
    found = patch_labels(np.array([7, 3, 7]), (2, 3))
    assert found.shape == (3, 2, 3)
    assert found[:, 0, 0].tolist() == [1, 0, 1]
    assert (found == found[:, :1, :1]).all()


def test_patch_colours_are_of_the_mean() -> None:
    images = torch.zeros(1, 3, 8, 8)
    images[0, 0, :4, :4] = 1.0  # red, at the top left
    images[0, :, 4:, 4:] = 0.5  # grey, at the bottom right
    red, grey = (2 * 3 + 0) * 3 + 0, (1 * 3 + 1) * 3 + 1
    assert patch_colours(images, (2, 2))[0].tolist() == [[red, 0], [0, grey]]


def test_patch_edges_are_ranked_and_evenly_filled() -> None:
    images = torch.zeros(2, 3, 32, 32)
    for image in range(2):
        for row in range(4):
            for column in range(4):
                stripes = (torch.arange(8) // 2 % 2).float() * (16 * image + 4 * row + column + 1) / 40
                images[image, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = stripes.repeat_interleave(1)
    levels = patch_edges(images, (4, 4))
    assert torch.bincount(levels.flatten(), minlength=8).tolist() == [4] * 8
    flat = torch.full((1, 3, 16, 16), 0.5)
    flat[..., 8:, 8:] = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    assert int(patch_edges(flat, (2, 2))[0].argmax()) == 3


def test_patch_edges__flat_patches_have_one_level() -> None:
    levels = torch.linspace(0.1, 0.9, 70).view(70, 1, 1, 1)
    images = levels.expand(70, 3, 16, 16).clone()
    assert set(patch_edges(images, (4, 4)).flatten().tolist()) == {0}
    images[0] = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert set(patch_edges(images, (4, 4)).flatten().tolist()) == {0, 7}
