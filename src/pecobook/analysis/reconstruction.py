"""What a tokenizer keeps of an image: encode and decode it again, and the error in decibels.

Shapes: images float (N, 3, H, W) in [0, 1], codes int64 (N, h, w).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pecobook.analysis.arrays import Tokenizer, evaluation_mode


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image (B, C, H, W) in [0, 1], float (B,) in dB; inf where equal."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    def measure(a: Tensor, b: Tensor) -> Tensor:
        return peak_signal_noise_ratio(a.double(), b.double(), data_range=1.0, reduction="none", dim=(1, 2, 3)).float()

    return _by_parts(measure, x, y)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity of each image (B, C, H, W) in [0, 1], float (B,) in [-1, 1]; 1 where equal.

    Wang et al., 2004: Gaussian windows of 11 pixels, deviation 1.5.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    def measure(a: Tensor, b: Tensor) -> Tensor:
        value = structural_similarity_index_measure(a.float(), b.float(), data_range=1.0, reduction="none")
        assert isinstance(value, Tensor)
        return value.reshape(len(a))  # torchmetrics drops the dimension of a single image

    return _by_parts(measure, x, y)


def _by_parts(measure: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """What is measured of each image, (B,); 64 at a time, since both metrics hold several copies of all they see."""
    if x.shape != y.shape:
        raise ValueError(f"images of equal shapes are compared, not {tuple(x.shape)} and {tuple(y.shape)}")
    pairs = zip(torch.split(x, 64), torch.split(y, 64), strict=True)
    return torch.cat([measure(a, b) for a, b in pairs])


def encode_all(tokenizer: Tokenizer, images: Tensor, batch_size: int = 64) -> Tensor:
    """Codes of all `images`, int64 (N, h, w) on the host, `batch_size` at a time."""
    device = tokenizer.codebook.device
    with evaluation_mode(tokenizer):
        parts = [tokenizer.encode(part.to(device)).cpu() for part in torch.split(images, batch_size)]
    return torch.cat(parts)  # outside, so that the result is an ordinary tensor


def decode_all(tokenizer: Tokenizer, codes: Tensor, batch_size: int = 64) -> Tensor:
    """Images of all `codes`, float (N, 3, H, W) in [0, 1] on the host."""
    device = tokenizer.codebook.device
    with evaluation_mode(tokenizer):
        parts = [tokenizer.decode(part.to(device)).float().cpu() for part in torch.split(codes, batch_size)]
    return torch.cat(parts).clamp(0, 1)
