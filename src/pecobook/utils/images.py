"""Sizes, value ranges, normalisation and memory layout of images, and Pillow pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pecobook.utils.devices import exporting


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 (C, H, W) to uint8 (C, height, width), bicubic and antialiased; the result is contiguous."""
    if image.shape[1:] == (height, width):
        return image.contiguous()
    pixels = image.float() if image.is_cuda else image  # the CUDA kernel takes floats only
    resized = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True, align_corners=False)[0]
    return resized.round_().clamp_(0, 255).to(torch.uint8) if image.is_cuda else resized


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 in 0..255 to float32 in [0, 1]."""
    return images.float().div_(255)


_OVERSHOOT = 0.5  # of images that were resized with a bicubic filter and not clamped


def check_shape(images: Any, channels: Sequence[int], stride: int = 1) -> None:
    """Raise ValueError unless images are a tensor (B, C, H, W) whose sides are multiples of the stride, and not 0.

    Args:
        images: the images.
        channels: the allowed values of C.
        stride: divisor of the sides.
    """
    numbers = " or ".join(map(str, channels))
    if not isinstance(images, Tensor):
        remedy = "pecobook.read_image reads a file, and torch.as_tensor converts an array"
        raise ValueError(f"Images must be a tensor, not {type(images).__name__}: {remedy}.")
    if images.ndim != 4:
        remedy = ": for one image give image[None]" if images.ndim == 3 else ""
        raise ValueError(f"Images must have the shape (B, {numbers}, H, W), not {tuple(images.shape)}{remedy}.")
    height, width = images.shape[-2:]
    if images.shape[1] not in channels:
        last = ": put the channels first, images.permute(0, 3, 1, 2)" if images.shape[3] in channels else ""
        raise ValueError(f"Images must have {numbers} channels, not {images.shape[1]}{last}.")
    if height % stride or width % stride or not (height and width):
        raise ValueError(f"Images must be multiples of {stride} pixels, not {height} x {width}: crop or resize them.")


def as_images(images: Tensor, channels: Sequence[int], stride: int = 1, *, check: bool = True) -> Tensor:
    """Return images as float32 (B, C, H, W) in [0, 1]; uint8 is divided by 255.

    Args:
        images: uint8 in 0..255, or floats of any precision in [0, 1], which may overshoot slightly, as after a bicubic
            resize.
        channels: the allowed values of C.
        stride: divisor of the sides.
        check: whether to check the values, which waits for a GPU.

    Raises:
        ValueError: the shape, the type or the values are invalid.
    """
    check_shape(images, channels, stride)
    if images.dtype == torch.uint8:
        return to_float(images)
    if not images.is_floating_point():
        raise ValueError(f"Images must be uint8 in 0..255 or floats in [0, 1], not {images.dtype}.")
    images = images.float()
    if exporting() or torch.compiler.is_compiling() or not check or not images.numel():
        return images
    low, high = (float(value) for value in images.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):  # aminmax passes nan on
        raise ValueError("Images contain values that are not finite (nan or infinity).")
    if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
        remedy = "divide them by 255, or give uint8" if low >= 0 else "they seem normalised: undo the normalisation"
        raise ValueError(f"Images must lie in [0, 1], not in [{low:.4g}, {high:.4g}]: {remedy}.")
    return images


def check_pixels(image: Tensor) -> None:
    """Raise ValueError unless `image` is one image, uint8 (3, H, W)."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or not all(image.shape):
        raise ValueError(f"The image must be uint8 (3, H, W) in 0..255, not {image.dtype} {tuple(image.shape)}.")


def to_pillow(image: Tensor) -> Image.Image:
    """Convert an image, uint8 (3, H, W), to a Pillow picture."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def encode_picture(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """Encode a Pillow picture as PNG or JPEG, with the options of its `save`."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


class Normalised(nn.Module):
    """A module whose images are normalised as in its network's training; its state dict leaves the numbers out."""

    mean: Tensor
    std: Tensor

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the mean and standard deviation of the channels, for images in [0, 1]."""
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise float images (..., 3, H, W) in [0, 1]."""
        return (images - self.mean) / self.std


def channels_last(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) in the memory layout that makes convolutions fast; the values do not change."""
    return images.contiguous(memory_format=torch.channels_last)


def fitted_size(height: int, width: int, short: float, long: float) -> tuple[int, int]:
    """Return height and width scaled to the short side `short`, or less if the long side would exceed `long`."""
    scale = min(short / min(height, width), long / max(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)
