"""Dependence of codes on the position, on codes whose dependence is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch import Tensor

from pecobook.analysis.codewords import mean_codewords
from pecobook.analysis.position import (
    MIN_PATCHES,
    checkerboard,
    commonest_code_accuracy,
    information_given_position,
    moved_codes,
    opposite_halves,
    position_dependence,
)
from pecobook.analysis.probe import linear_probe
from pecobook.analysis.semantics import joint_counts, mutual_information


def random_codes(num_images: int, num_codes: int, seed: int = 0) -> Tensor:
    return torch.randint(num_codes, (num_images, 4, 4), generator=torch.Generator().manual_seed(seed))


def test_position_dependence__of_codes_that_name_their_position() -> None:
    result = position_dependence(torch.arange(16).view(4, 4).repeat(30, 1, 1))
    assert result.share == pytest.approx(1)
    assert result.bound == 100
    assert result.null_share < 0.2
    assert result.null_bound == 0


def test_position_dependence__of_a_private_vocabulary_at_each_position() -> None:
    """Codes with four values at each position of their own: the code tells the position, and two more bits."""
    codes = 4 * torch.arange(16).view(4, 4) + random_codes(400, 4)
    result = position_dependence(codes)
    assert result.share == pytest.approx(1)
    assert result.bound == 100


def test_position_dependence__of_codes_without_position_is_that_of_permuted_codes() -> None:
    result = position_dependence(random_codes(300, 64))
    assert result.share == pytest.approx(result.null_share, abs=0.01)
    assert result.bound == result.null_bound == 0


def test_position_dependence__is_mutual_information_over_the_entropy_of_positions() -> None:
    codes = random_codes(50, 20) + torch.arange(16).view(4, 4) // 5
    positions = torch.arange(16).view(4, 4).expand(codes.shape)
    bits = mutual_information(joint_counts(codes, positions, 40, 16))
    assert position_dependence(codes).share == pytest.approx(bits / 4)


def test_position_dependence__of_narrow_integers_is_that_of_wide_ones() -> None:
    """Codes times positions do not fit into the integers of a token bank."""
    codes = np.random.default_rng(0).integers(60_000, 60_040, (40, 14, 14))
    assert position_dependence(codes.astype(np.uint16)) == position_dependence(codes)
    codes[:, 0, 0] = 2**24 - 1
    assert position_dependence(codes.astype(np.int32)) == position_dependence(codes)
    assert position_dependence(codes).bound == pytest.approx(100 / 41)


@pytest.mark.parametrize("shape", [(40, 4, 4), (1, 4, 4), (30, 2, 7), (25, 1, 2), (20, 3, 3)])
@pytest.mark.parametrize("num_codes", [1, 9, 5000])
def test_position_dependence__is_that_of_scikit_learn(shape: tuple[int, int, int], num_codes: int) -> None:
    codes = np.random.default_rng(0).integers(0, num_codes, shape)
    flat, num_positions = codes.reshape(len(codes), -1), shape[1] * shape[2]
    expected = mutual_info_score(flat.ravel(), np.tile(np.arange(num_positions), len(codes))) / np.log(num_positions)
    result = position_dependence(codes)
    assert result.share == pytest.approx(expected, abs=1e-9)
    places = [set(np.nonzero(flat == code)[1]) for code in np.unique(flat) if (flat == code).sum() >= MIN_PATCHES]
    bound = 100 * np.mean([len(place) == 1 for place in places]) if places else np.nan
    assert result.bound == pytest.approx(bound, nan_ok=True)


def test_information_given_position__is_that_of_scikit_learn_at_each_position() -> None:
    """With many images the correction, which the permutations of codes estimate, is small."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 3, (5000, 1, 3))
    codes = (values + (rng.random(values.shape) < 0.3)) % 3
    shares = [
        mutual_info_score(codes[:, 0, p], values[:, 0, p]) / mutual_info_score(values[:, 0, p], values[:, 0, p])
        for p in range(3)
    ]
    assert information_given_position(codes, values) == pytest.approx(float(np.mean(shares)), abs=2e-3)


def test_position_dependence__counts_codewords_bound_to_one_position() -> None:
    codes = torch.zeros(20, 1, 4, dtype=torch.int64)
    codes[:, 0, 1] = 1  # always at position 1
    codes[:9, 0, 2] = 2  # nine patches are too few to count
    codes[::2, 0, 3] = 3  # half of position 3
    assert position_dependence(codes).bound == pytest.approx(100 * 2 / 3)


def test_position_dependence__of_a_single_position() -> None:
    result = position_dependence(torch.zeros(5, 1, 1, dtype=torch.int64))
    assert (result.share, result.null_share) == (0, 0)
    assert np.isnan(result.bound)


def test_information_given_position__is_not_fooled_by_the_position() -> None:
    """Codes and values that both follow from the position share much information, and none at a position."""
    positions = torch.arange(16).view(4, 4).repeat(200, 1, 1)
    values = torch.where(torch.rand(200, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.9, positions, 0)
    assert mutual_information(joint_counts(positions, values, 16, 16)) > 2
    assert information_given_position(positions, values) == pytest.approx(0, abs=1e-6)


def test_information_given_position__of_codes_that_determine_the_value() -> None:
    values = random_codes(400, 6)
    private = 6 * torch.arange(16).view(4, 4) + values
    assert information_given_position(private, values) == pytest.approx(1)
    assert information_given_position(values, values) == pytest.approx(1)
    assert information_given_position(random_codes(400, 6, seed=3), values) < 0.05
    assert information_given_position(values, torch.zeros_like(values)) == 0


class Mean:
    """A tokenizer that codes the brightness of each patch of two pixels, and the position if `positional`."""

    codebook = torch.zeros(1, 1)
    image_size = 8

    def __init__(self, *, positional: bool = False) -> None:
        self.positional = positional

    def encode(self, images: Tensor) -> Tensor:
        brightness = (torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 2)[:, 0] * 255).round().long()
        grid = torch.arange(brightness[0].numel()).view(brightness.shape[1:])
        return brightness + 256 * grid if self.positional else brightness

    def decode(self, codes: Tensor) -> Tensor:
        raise NotImplementedError


def test_moved_codes() -> None:
    images = torch.rand(6, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    assert moved_codes(Mean(), images, 2) == {"roll": 100, "crop": 100}
    assert moved_codes(Mean(positional=True), images, 2) == {"roll": 0, "crop": 0}


def test_checkerboard() -> None:
    assert checkerboard((2, 3)).tolist() == [[True, False, True], [False, True, False]]


def test_commonest_code_accuracy() -> None:
    train = torch.tensor([[[1, 2]], [[1, 3]], [[0, 3]]])
    codes = torch.tensor([[[1, 3]], [[1, 2]], [[0, 3]]])
    assert commonest_code_accuracy(train, codes, torch.ones_like(codes, dtype=torch.bool)) == pytest.approx(400 / 6)
    mask = torch.tensor([[[True, False]], [[False, True]], [[False, False]]])
    assert commonest_code_accuracy(train, codes, mask) == pytest.approx(50)


def test_opposite_halves__a_probe_is_at_chance_for_codes_that_are_positions() -> None:
    """A vocabulary of its own at each position tells the class to the plain probe alone."""
    labels = torch.arange(300) % 3
    contents, book = labels[:, None, None].expand(300, 4, 4), torch.randn(48, 8)
    private = contents + 3 * torch.arange(16).view(4, 4)
    accuracy = {}
    for name, codes in (("contents", contents), ("private", private)):
        halves = opposite_halves(codes, codes[:200])
        assert halves is not None
        train, test = (mean_codewords(half, book) for half in halves)
        accuracy[name] = linear_probe(train, labels, test, labels[:200]).accuracy
    assert accuracy["contents"] > 99
    assert accuracy["private"] < 67
    assert opposite_halves(contents[:, :1, :3], contents[:, :1, :3]) is None
