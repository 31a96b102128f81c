"""Sizes and scales of pictures, for data, models and everything else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bicubic, antialiased: uint8 (C, H, W) to uint8 (C, height, width), contiguous."""
    if image.shape[1:] == (height, width):
        return image.contiguous()
    if image.is_cuda:  # whose kernel knows floats alone
        image = image.float()
        stretched = F.interpolate(image[None], (height, width), mode="bicubic", antialias=True, align_corners=False)[0]
        return stretched.round_().clamp_(0, 255).to(torch.uint8)
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True, align_corners=False)[0]


def to_float(images: Tensor) -> Tensor:
    """uint8 in 0..255 to float32 in [0, 1]."""
    return images.float().div_(255)


def channels_last(images: Tensor) -> Tensor:
    """(B, C, H, W) in the memory layout in which convolutions are fast; shape and values are the same."""
    return images.contiguous(memory_format=torch.channels_last)


def fitted_size(height: int, width: int, short: float, long: float) -> tuple[int, int]:
    """Height and width with the short side `short`, unless the long one would be above `long`."""
    scale = min(short / min(height, width), long / max(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)
