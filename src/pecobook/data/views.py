"""Views: augmented versions of an image, each a pure function of a 64-bit key.

The data workers change geometry (crop, resize, flip) image by image, because images differ in size. The device applies
colour augmentation (`photometric`) to whole batches, where this is cheap; the random numbers for it are drawn here from
the same key and are part of the batch. (seed, image, view number) therefore identifies a view, which can be recomputed
at any time.

`NamedViews` are the views for pre-training. timm's augmentations, at the end of the file, are functions of a key too.

B batch size, H and W height and width in pixels, u uniform numbers in [0, 1).
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pecobook.data.batch import Batch
from pecobook.data.sampler import key, uniform
from pecobook.errors import ConfigError
from pecobook.settings.images import PhotometricConfig
from pecobook.utils.images import resize, to_float

# Strengths of brightness, contrast, saturation, hue; whether to apply jitter, grey, blur, solarisation; blur width.
NUM_COLOUR_DRAWS = 9
_FLIP_DRAW = 40
"""Index of the draw that decides on the flip, after those of ten attempts to place a crop."""


def crop_box(
    height: int, width: int, view_key: int, *, min_area: float, max_aspect: float = 4 / 3
) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a random crop, by the rule of torchvision's RandomResizedCrop.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        view_key: the key of the view, which gives ten attempts of (area, aspect, top, left); most crops need one.
        min_area: minimum area of the crop, as a fraction of the image's area.
        max_aspect: maximum aspect ratio; the minimum is its inverse.
    """
    draw = partial(uniform, view_key)
    for first in range(0, _FLIP_DRAW, 4):
        area = height * width * (min_area + draw(first) * (1 - min_area))
        aspect = math.exp((2 * draw(first + 1) - 1) * math.log(max_aspect))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(draw(first + 2) * (height - crop_height + 1))
            left = int(draw(first + 3) * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height, crop_width = height, width  # no attempt fitted: the largest central crop of a valid aspect ratio
    if width / height > max_aspect:
        crop_width = max(round(height * max_aspect), 1)
    elif height / width > max_aspect:
        crop_height = max(round(width * max_aspect), 1)
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def random_crop(image: Tensor, size: int, view_key: int, *, min_area: float, flip: bool = True) -> Tensor:
    """Crop an image at random, flip it horizontally with probability 0.5, and resize it (bicubic, antialiased).

    Args:
        image: uint8 (C, H, W).
        size: side of the view in pixels.
        view_key: the key of the view.
        min_area: minimum area of the crop, as a fraction of the image's area.
        flip: whether the image may be flipped.

    Returns:
        uint8 (C, size, size).
    """
    top, left, height, width = crop_box(image.shape[1], image.shape[2], view_key, min_area=min_area)
    view = resize(image[:, top : top + height, left : left + width], size, size)
    is_flipped = flip and uniform(view_key, _FLIP_DRAW) < 0.5
    return view.flip(2) if is_flipped else view  # last, since the view is usually smaller than the crop


def center_crop(image: Tensor, size: int, *, share: float = 1.0) -> Tensor:
    """Crop the central square, with a side of `share` times the image's shorter side, and resize it.

    uint8 (C, H, W) becomes uint8 (C, size, size).
    """
    height, width = image.shape[1:]
    side = max(round(min(height, width) * share), 1)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[:, top : top + side, left : left + side], size, size)


def shortest_side(view: Callable[..., Any]) -> int:
    """Return the shorter side, in pixels, that large images must keep for a view function; 0 if it needs whole images.

    A random crop is then scaled down to half its side or less, and a central crop to a quarter, so that the reduction
    changes few values of the view by more than one level.

    Args:
        view: a method of an object with `image_size` and `min_crop`, such as `NamedViews`, or a partial of a function
            with the arguments `size` and `min_area`, of `central_view`, or of a view of detection.
    """
    owner = getattr(view, "__self__", None)
    arguments: dict[str, Any] = getattr(view, "keywords", {})
    if owner is not None and hasattr(owner, "min_crop"):
        arguments = {"size": owner.image_size, "min_area": owner.min_crop}
    if "min_area" in arguments:
        return math.ceil(2 * float(arguments["size"]) / math.sqrt(0.75 * arguments["min_area"]))
    if "max_size" in arguments:  # detection, in training
        jitter = arguments["jitter"]
        return math.ceil(2 * float(arguments["canvas"] * jitter[-1] if jitter else max(arguments["scales"])))
    if "short" in arguments:  # detection, in evaluation
        return 4 * int(arguments["short"])
    if getattr(view, "func", None) is central_view:
        return math.ceil(4 * float(arguments["size"]) / float(arguments.get("share", 1.0)))
    return 0


def central_view(image: Tensor, view_key: int, *, size: int, share: float = 1.0) -> dict[str, Tensor]:  # noqa: ARG001
    """Return the view of a held-out image, {"image": uint8 (C, size, size)}; the key has no effect."""
    return {"image": center_crop(image, size, share=share)}


def colour_draws(view_key: int) -> Tensor:
    """Draw the random numbers for the colour augmentation of one view: float32 (9,) in [0, 1)."""
    colour_key = key(view_key, 1)
    return torch.tensor([uniform(colour_key, number) for number in range(NUM_COLOUR_DRAWS)], dtype=torch.float32)


# --------------------------------------------------------------------------------------- colour, on the device


def photometric(images: Tensor, draws: Tensor, config: PhotometricConfig) -> Tensor:
    """Apply colour augmentation to each image using its random numbers.

    The order is fixed: brightness, contrast, saturation, hue, grey, blur, solarisation.

    Args:
        images: float (B, 3, H, W) in [0, 1].
        draws: float (B, 9) in [0, 1), from `colour_draws`.
        config: strengths and probabilities.

    Returns:
        float (B, 3, H, W) in [0, 1].
    """
    strength = draws[:, :4] * 2 - 1  # (B, 4) in [-1, 1)
    # An image without jitter gets strength 0, which is the identity, so the whole batch is changed at once.
    strength = strength * (draws[:, 4:5] < config.jitter)
    images = brightness(images, 1 + config.brightness * strength[:, 0])
    images = adjust_contrast(images, 1 + config.contrast * strength[:, 1])
    images = saturation(images, 1 + config.saturation * strength[:, 2])
    if config.hue > 0:
        images = hue(images, config.hue * strength[:, 3])
    images = saturation(images, 1 - (draws[:, 5] < config.grey).float())
    if config.blur > 0:
        blurred = gaussian_blur(images, 0.1 + 1.9 * draws[:, 8])
        images = torch.where((draws[:, 6] < config.blur)[:, None, None, None], blurred, images)
    if config.solarise > 0:
        is_solarised = (draws[:, 7] < config.solarise)[:, None, None, None]
        images = torch.where(is_solarised & (images >= 0.5), 1 - images, images)
    return images


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply each image by its `factor` (B,), and clamp to [0, 1]."""
    return (images * factor[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its mean grey value by `factor` (B,): 0 gives uniform grey, 1 the image."""
    mean = luma(images).mean((2, 3), keepdim=True)  # (B, 1, 1, 1)
    return (mean + factor[:, None, None, None] * (images - mean)).clamp_(0, 1)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Blend each image with its grey version by `factor` (B,): 0 gives the grey version, 1 the image."""
    grey = luma(images)
    return (grey + factor[:, None, None, None] * (images - grey)).clamp_(0, 1)


def luma(images: Tensor) -> Tensor:
    """Convert RGB (B, 3, H, W) to grey (B, 1, H, W) by ITU-R 601."""
    return images[:, :1] * 0.2989 + images[:, 1:2] * 0.587 + images[:, 2:3] * 0.114


def hue(images: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue of each image by `shift` (B,) turns in HSV: (B, 3, H, W) in [0, 1] to (B, 3, H, W) in [0, 1]."""
    value, argmax = images.max(1)  # (B, H, W)
    chroma = value - images.min(1).values
    red, green, blue = images.unbind(1)
    divisor = chroma.clamp_min(1e-12)
    angle = torch.where(
        argmax == 0,
        (green - blue) / divisor,
        torch.where(argmax == 1, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )  # in sixths of a turn
    angle = angle + 6 * shift[:, None, None]
    # HSV to RGB without cases: f(n) = V - C max(0, min(k, 4 - k, 1)) with k = (n + angle) mod 6, for n = 5, 3, 1.
    # `offsets` is made on the device, because a copy from the host would synchronise.
    offsets = 5.0 - 2.0 * torch.arange(3, device=images.device)[None, :, None, None]
    k = (offsets + angle[:, None]) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image by its `sigma` (B,), given in pixels of a 224-pixel view and scaled to the image's height."""
    B, C, H, W = images.shape
    sigma = (sigma * H / 224).clamp_min(1e-3)
    radius = max(1, math.ceil(3 * 2.0 * H / 224))
    radius = min(radius, H - 1, W - 1)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp(-0.5 * (offsets[None] / sigma[:, None]) ** 2)  # (B, 2 radius + 1)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(C, 0)
    flat = images.reshape(1, B * C, H, W)
    flat = F.conv2d(F.pad(flat, (radius, radius, 0, 0), "reflect"), kernel[:, None, None, :], groups=B * C)
    flat = F.conv2d(F.pad(flat, (0, 0, radius, radius), "reflect"), kernel[:, None, :, None], groups=B * C)
    return flat.view(B, C, H, W)


# ------------------------------------------------------------------------------------------------ views of pre-training


@dataclasses.dataclass(frozen=True)
class NamedViews:
    """The settings that define every view, and the functions that make one."""

    seed: int
    """Seed of the crops and the colour augmentation."""
    image_size: int
    """Side of the crops, in pixels."""
    tokenizer_size: int
    """Side to which crops are resized for the tokenizer, in pixels."""
    min_crop: float
    """Smallest share of the image's area in a random crop, in (0, 1]."""
    colour: PhotometricConfig
    """Strengths of the colour augmentation."""

    @classmethod
    def of(cls, config: Any) -> NamedViews:
        """Returns the views of a pretrain or tokenize configuration."""
        side = config.image_size
        return cls(config.seed, side, config.tokenizer_size or side, config.min_crop, config.colour)

    @classmethod
    def of_bank(cls, config: dict[str, Any]) -> NamedViews:
        """Returns the views of a token bank from its config.json, which contains `settings()`."""
        fields = {field.name: config[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**fields, "colour": PhotometricConfig(**config["colour"])})

    def settings(self) -> dict[str, Any]:
        """Returns the settings as plain values, for a JSON file."""
        return dataclasses.asdict(self)

    def train(self, image: Tensor, view_key: int) -> dict[str, Tensor]:
        """Returns a random crop uint8 (3, S, S) of a training image and the random numbers (9,) of the colours."""
        crop = random_crop(image, self.image_size, view_key, min_area=self.min_crop)
        return {"image": crop, "colour": colour_draws(view_key)}

    def evaluation(self, image: Tensor, view_key: int) -> dict[str, Tensor]:
        """Returns the central crop of a held-out image, which is equal for every key, in the form of `train`."""
        return {"image": center_crop(image, self.image_size), "colour": colour_draws(view_key)}

    def pixels(self, batch: Batch, *, training: bool) -> Tensor:
        """Returns the input of ViT and tokenizer, float (B, 3, S, S) in [0, 1]; colours change in training only."""
        images = to_float(batch["image"])
        return photometric(images, batch["colour"], self.colour) if training else images


# ------------------------------------------------------------------------------------------------- timm's augmentations


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python and NumPy with `seed` (64 bits), and restore their states on exit."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@lru_cache(maxsize=4)
def _rand_augment(policy: str) -> Any:
    from timm.data.auto_augment import rand_augment_transform

    try:
        # Rotations and shears fill the uncovered area with ImageNet's mean colour.
        return rand_augment_transform(policy, {"translate_const": 100, "img_mean": (124, 116, 104)})
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"--rand-augment '{policy}' is not a valid timm policy, such as rand-m9-mstd0.5-inc1: {error}"
        ) from None


def check_policy(policy: str) -> None:
    """Raise ConfigError if timm cannot parse the RandAugment policy; an empty policy is valid."""
    if policy and not policy.startswith("rand"):
        raise ConfigError(f"--rand-augment '{policy}' is not a valid timm policy, such as rand-m9-mstd0.5-inc1.")
    if policy:
        _rand_augment(policy)


def rand_augment(image: Tensor, policy: str, view_key: int) -> Tensor:
    """Apply RandAugment (arXiv 1909.13719) with a timm policy: uint8 (3, H, W) to uint8 (3, H, W)."""
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image

    with seeded(view_key):
        return pil_to_tensor(_rand_augment(policy)(to_pil_image(image)))  # type: ignore[no-any-return]


def random_erasing(images: Tensor, probability: float) -> Tensor:
    """Fill one rectangle with noise in some of the normalised images (B, C, H, W), in place.

    Random erasing is from Zhong et al., arXiv 1708.04896; as in timm's pixel mode, each pixel gets its own noise value.
    torch's global generator provides the seed.
    """
    from timm.data.random_erasing import RandomErasing

    with seeded(int(torch.randint(2**62, ()))):
        return RandomErasing(probability, mode="pixel", device=images.device)(images)  # type: ignore[no-any-return]
