"""Views: crops lie inside the image, and colour changes agree with torchvision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from pecobook.data import views
from pecobook.data.sampler import key, uniforms
from pecobook.data.views import NUM_COLOUR_DRAWS, center_crop, colour_draws, crop_box, photometric, random_crop
from pecobook.settings.images import PhotometricConfig
from pecobook.utils.images import resize, to_float

SIDES = st.one_of(st.integers(1, 5), st.integers(1, 1000))
NO_CHANGE = PhotometricConfig(jitter=0, grey=0, blur=0, solarise=0)


def pixels(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def batch(number: int = 6, side: int = 24) -> Tensor:
    """Make smooth and noisy images, a black image, a grey image, and an image of zeros and ones."""
    images = to_float(torch.stack([pixels(side, side, seed) for seed in range(number)]))
    images[0] = images[0].cumsum(1) / side
    images[1] = 0
    images[2] = images[2, :1]
    images[3] = images[3].round()
    return images.clamp(0, 1)


# ----------------------------------------------------------------------------------------------------------- geometry


@given(SIDES, SIDES, st.integers(0, 2**64 - 1), st.floats(0.001, 1), st.floats(1, 3))
def test_crop_box__lies_inside(height: int, width: int, seed: int, min_area: float, max_aspect: float) -> None:
    top, left, h, w = crop_box(height, width, seed, min_area=min_area, max_aspect=max_aspect)
    assert h >= 1
    assert w >= 1
    assert 0 <= top <= height - h
    assert 0 <= left <= width - w


@given(SIDES, SIDES, st.integers(0, 2**64 - 1), st.floats(0.001, 1))
def test_crop_box__is_torchvisions_rule_on_the_numbers_of_its_key(h: int, w: int, seed: int, min_area: float) -> None:
    numbers = iter(uniforms(seed, 40).tolist())
    expected = None
    for area, aspect, top, left in zip(*4 * [numbers], strict=True):
        pixels, ratio = h * w * (min_area + area * (1 - min_area)), math.exp((2 * aspect - 1) * math.log(4 / 3))
        width, height = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if expected is None and 0 < width <= w and 0 < height <= h:
            expected = int(top * (h - height + 1)), int(left * (w - width + 1)), height, width
    if expected is not None:
        assert crop_box(h, w, seed, min_area=min_area) == expected


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 1000), (1000, 1), (2, 3)])
def test_crop_box__of_tiny_and_narrow_images(height: int, width: int) -> None:
    for draw in range(200):
        top, left, h, w = crop_box(height, width, key(draw), min_area=0.2)
        assert 1 <= h <= height - top
        assert 1 <= w <= width - left
        assert min(top, left) >= 0


def test_crop_box__keeps_to_area_and_aspect() -> None:
    boxes = np.array([crop_box(350, 350, key(draw), min_area=0.2) for draw in range(3000)])
    area, aspect = boxes[:, 2] * boxes[:, 3] / 350**2, boxes[:, 3] / boxes[:, 2]
    assert area.min() > 0.195
    assert aspect.min() > 0.74
    assert aspect.max() < 1.35
    assert np.log(aspect).mean() == pytest.approx(0, abs=0.02)
    place = boxes[:, :2] / np.maximum(350 - boxes[:, 2:], 1)
    assert_close(place.mean(0), np.array([0.5, 0.5]), atol=0.03, rtol=0)


def test_crop_box__reaches_every_place_equally_often() -> None:
    boxes = [crop_box(6, 6, key(draw), min_area=0.4) for draw in range(4000)]
    for side in (0, 1):
        starts = np.bincount([box[side] for box in boxes if box[side + 2] == 4])
        assert len(starts) == 3  # 0, 1 and 2 in 6 pixels
        assert starts.min() > 0.85 * starts.mean()


def test_crop_box__has_torchvisions_distribution() -> None:
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    image = torch.zeros(3, 90, 200)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)])
    ours = np.array([crop_box(90, 200, key(draw), min_area=0.2) for draw in range(2000)])
    spread = theirs.std(0) + ours.std(0)
    assert (np.abs(theirs.mean(0) - ours.mean(0)) < 5 * spread / 2000**0.5).all()
    assert_close(theirs.std(0), ours.std(0), atol=1.0, rtol=0.1)


def test_crop_box__falls_back_to_the_centre() -> None:
    # No crop with the area of a 10 x 1000 image has a valid aspect ratio, so the largest valid central crop is used.
    assert crop_box(10, 1000, 0, min_area=1.0) == (0, 493, 10, 13)
    assert crop_box(1000, 10, 0, min_area=1.0) == (493, 0, 13, 10)


@settings(max_examples=40, deadline=None)
@given(SIDES, SIDES, st.integers(0, 2**64 - 1), st.integers(2, 40))
def test_random_crop__is_a_function_of_its_key(height: int, width: int, view_key: int, size: int) -> None:
    image = pixels(height, width)
    before = image.clone()
    view = random_crop(image, size, view_key, min_area=0.2)
    assert view.shape == (3, size, size)
    assert view.dtype == torch.uint8
    assert view.is_contiguous()
    torch.rand(3)  # the global generator has no effect
    assert torch.equal(view, random_crop(image, size, view_key, min_area=0.2))
    assert torch.equal(image, before)


def test_random_crop__differs_by_key_and_flips_half() -> None:
    image = torch.arange(64, dtype=torch.uint8).repeat(3, 64, 1) * 4  # brighter to the right
    crops = [random_crop(image, 16, key(draw), min_area=0.2) for draw in range(400)]
    assert len({crop.numpy().tobytes() for crop in crops}) > 300  # all rows are equal, so some crops are equal
    flipped = sum(int(crop[0, 0, 0] > crop[0, 0, -1]) for crop in crops)
    assert 150 < flipped < 250


def test_random_crop__is_the_crop_then_the_flip_then_the_resize() -> None:
    image = pixels(50, 70)
    for draw in range(10):
        u = uniforms(key(draw), 41)
        top, left, height, width = crop_box(50, 70, key(draw), min_area=0.2)
        crop = tv.resized_crop(image, top, left, height, width, [32, 32], tv.InterpolationMode.BICUBIC, antialias=True)
        expected = tv.horizontal_flip(crop) if u[40] < 0.5 else crop
        difference = (random_crop(image, 32, key(draw), min_area=0.2).int() - expected.int()).abs()
        assert difference.max() <= 1  # a mirrored sum is rounded in another order


def test_resize__does_not_wrap_around() -> None:
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat_interleave(8).repeat(3, 16, 4)  # bicubic overshoots here
    larger = resize(stripes, 48, 192)
    on = larger[0, 24].view(-1, 24)
    assert larger.dtype == torch.uint8
    assert (on[0::2, 3:-3] == 0).all()
    assert (on[1::2, 3:-3] == 255).all()


def test_resize__leaves_an_image_of_the_right_size() -> None:
    image = pixels(8, 9)
    assert torch.equal(resize(image, 8, 9), image)
    assert resize(image.flip(2), 8, 9).is_contiguous()


@settings(max_examples=30, deadline=None)
@given(SIDES, SIDES, st.integers(2, 40))
def test_center_crop__is_square(height: int, width: int, size: int) -> None:
    view = center_crop(pixels(height, width), size)
    assert view.shape == (3, size, size)
    assert view.dtype == torch.uint8


def test_center_crop__is_torchvisions() -> None:
    image = pixels(60, 90)
    expected = tv.resize(tv.center_crop(image, [60]), [32], tv.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(center_crop(image, 32), expected)


# ------------------------------------------------------------------------------------------------------------- colour


def test_colour_draws__are_a_function_of_the_key() -> None:
    draws = torch.stack([colour_draws(key(i)) for i in range(2000)])
    assert draws.shape == (2000, NUM_COLOUR_DRAWS)
    assert draws.dtype == torch.float32
    assert torch.equal(draws[3], colour_draws(key(3)))
    assert_close(draws.mean(0), torch.full((NUM_COLOUR_DRAWS,), 0.5), atol=0.04, rtol=0)
    # The numbers for the crop of a view and for its colours must be uncorrelated.
    crops = torch.from_numpy(np.stack([uniforms(key(i), 41) for i in range(2000)])).float()
    related = torch.corrcoef(torch.cat([crops, draws], 1).T)[:41, 41:]
    assert related.abs().max() < 0.12


def test_to_float__reaches_both_ends() -> None:
    assert to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == [0.0, pytest.approx(0.2), 1.0]


FACTORS = (0.0, 0.3, 1.0, 1.4, 2.5, 0.9)


@pytest.mark.parametrize(
    ("ours", "theirs", "amounts"),
    [
        (views.brightness, tv.adjust_brightness, FACTORS),
        (views.adjust_contrast, tv.adjust_contrast, FACTORS),
        (views.saturation, tv.adjust_saturation, FACTORS),
        (views.hue, tv.adjust_hue, (0.0, -0.5, 0.5, 0.1, -0.07, 0.31)),
    ],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_colours__are_torchvisions(ours: Any, theirs: Any, amounts: tuple[float, ...]) -> None:
    images = batch()
    before = images.clone()
    expected = torch.stack([theirs(image, amount) for image, amount in zip(images, amounts, strict=True)])
    assert_close(ours(images, torch.tensor(amounts)), expected, atol=1e-4, rtol=0)
    assert torch.equal(images, before)


def test_luma__is_torchvisions_grey() -> None:
    images = batch()
    assert_close(views.luma(images), tv.rgb_to_grayscale(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", [32, 96, 224])
def test_gaussian_blur__is_torchvisions(side: int) -> None:
    images = batch(5, side)
    radius = math.ceil(6 * side / 224)
    sigmas = [0.1, 0.5, 1.0, 1.5, 2.0]  # pixels at 224
    blurred = views.gaussian_blur(images, torch.tensor(sigmas))
    for image, sigma, ours in zip(images, sigmas, blurred, strict=True):
        theirs = tv.gaussian_blur(image, [2 * radius + 1] * 2, [sigma * side / 224] * 2)
        assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (2, 3)])
def test_gaussian_blur__works_on_tiny_images(height: int, width: int) -> None:
    images = torch.full((2, 3, height, width), 0.3)
    assert_close(views.gaussian_blur(images, torch.tensor([0.1, 2.0])), images)


def test_photometric__changes_nothing_if_no_change_is_drawn() -> None:
    images = batch()
    draws = torch.rand(6, NUM_COLOUR_DRAWS, generator=torch.Generator().manual_seed(0))
    assert_close(photometric(images, draws, NO_CHANGE), images, atol=1e-5, rtol=0)
    # Changes with a strength above 0 are not applied if the draw is above their probability.
    draws[:, 4:8] = 0.9
    config = PhotometricConfig(jitter=0.8, grey=0.2, blur=0.5, solarise=0.5)
    assert_close(photometric(images, draws, config), images, atol=1e-5, rtol=0)


def sequential(image: Tensor, u: list[float], config: PhotometricConfig) -> Tensor:
    """Change the colours of one image with torchvision, one change after the other."""
    brightness, contrast, saturation, hue, jitter, grey, blur, solarise, width = u
    if jitter < config.jitter:
        image = tv.adjust_brightness(image, 1 + config.brightness * (2 * brightness - 1))
        image = tv.adjust_contrast(image, 1 + config.contrast * (2 * contrast - 1))
        image = tv.adjust_saturation(image, 1 + config.saturation * (2 * saturation - 1))
        image = tv.adjust_hue(image, config.hue * (2 * hue - 1))
    if grey < config.grey:
        image = tv.rgb_to_grayscale(image, 3)
    if blur < config.blur:
        side = image.shape[-1]
        radius = math.ceil(6 * side / 224)
        image = tv.gaussian_blur(image, [2 * radius + 1] * 2, [(0.1 + 1.9 * width) * side / 224] * 2)
    if solarise < config.solarise:
        image = tv.solarize(image, 0.5)
    return image


def test_photometric__is_torchvisions_image_by_image() -> None:
    config = PhotometricConfig(jitter=0.6, grey=0.3, blur=0.5, solarise=0.4)
    images = batch(24)
    draws = torch.stack([colour_draws(key(5, i)) for i in range(24)])
    expected = torch.stack([sequential(i, u, config) for i, u in zip(images, draws.tolist(), strict=True)])
    changed = photometric(images, draws, config)
    assert changed.min() >= 0
    assert changed.max() <= 1
    # A pixel within rounding of 0.5 may fall on the other side of the solarisation.
    differs = (changed - expected).abs() > 2e-4
    assert differs.float().mean() < 1e-3
    assert ((changed + expected)[differs] - 1).abs().max() < 1e-3 if differs.any() else True


def test_photometric__treats_each_image_alone() -> None:
    config = PhotometricConfig(jitter=0.6, grey=0.3, blur=0.5, solarise=0.4)
    images = batch(12)
    draws = torch.stack([colour_draws(key(6, i)) for i in range(12)])
    before = images.clone()
    together = photometric(images, draws, config)
    alone = torch.cat([photometric(images[i : i + 1], draws[i : i + 1], config) for i in range(12)])
    assert_close(together, alone, atol=1e-6, rtol=0)
    assert torch.equal(images, before)


@pytest.mark.parametrize(("name", "column"), [("jitter", 4), ("grey", 5), ("blur", 6), ("solarise", 7)])
def test_photometric__makes_each_change_where_it_is_drawn(name: str, column: int) -> None:
    images = to_float(pixels(64, 64)).expand(200, 3, 64, 64)
    draws = torch.stack([colour_draws(key(7, i)) for i in range(200)])
    draws[:, [0, 8]] = 0.95  # strong enough to be detected
    config = PhotometricConfig(**{**vars(NO_CHANGE), name: 0.3})
    changed = (photometric(images, draws, config) - images).abs().amax((1, 2, 3)) > 1e-3
    assert torch.equal(changed, draws[:, column] < 0.3)
    assert 30 < changed.sum() < 90
