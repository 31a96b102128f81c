"""Sizes, value ranges and memory layout of images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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


def checked_floats(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) as floats in [0, 1]: uint8 is divided by 255, floats are returned unchanged.

    Raises:
        ValueError: another shape, or other integers.
    """
    if images.ndim != 4:
        remedy = ": for one image give image[None]" if images.ndim == 3 else ""
        raise ValueError(f"Images must have the shape (B, C, H, W), not {tuple(images.shape)}{remedy}.")
    if images.dtype == torch.uint8:
        return to_float(images)
    if not images.is_floating_point():
        raise ValueError(f"Images must be uint8 in 0..255 or floats in [0, 1], not {images.dtype}.")
    return images


def check_pixels(image: Tensor) -> None:
    """Raise ValueError unless `image` is one image, uint8 (3, H, W)."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"The image must be uint8 (3, H, W) in 0..255, not {image.dtype} {tuple(image.shape)}.")


def channels_last(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) in the memory layout in which convolutions are fast; the values do not change."""
    return images.contiguous(memory_format=torch.channels_last)


def fitted_size(height: int, width: int, short: float, long: float) -> tuple[int, int]:
    """Return height and width scaled to the short side `short`, or less where the long side would exceed `long`."""
    scale = min(short / min(height, width), long / max(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)
