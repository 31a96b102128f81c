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


def channels_last(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) in the memory layout in which convolutions are fast; the values do not change."""
    return images.contiguous(memory_format=torch.channels_last)


def fitted_size(height: int, width: int, short: float, long: float) -> tuple[int, int]:
    """Return height and width scaled to the short side `short`, or less where the long side would exceed `long`."""
    scale = min(short / min(height, width), long / max(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)
