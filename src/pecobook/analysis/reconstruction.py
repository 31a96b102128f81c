"""Encoding and decoding of many images, the quality of reconstructions (PSNR, SSIM), and masked prediction.

Shapes: images float (N, 3, H, W) in [0, 1]; codes int64 (N, h, w); mask bool (N, h, w), True = masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pecobook.analysis.arrays import MaskedModel, Tokenizer, evaluation_mode
from pecobook.utils.devices import widest
from pecobook.utils.images import to_float

_WINDOW = 11
"""Side of SSIM's windows, pixels."""


def float_parts(images: Tensor, batch_size: int = 64) -> Iterator[Tensor]:
    """Yield `batch_size` images at a time as floats in [0, 1]; as uint8, many images take a quarter of the memory."""
    for part in torch.split(images, batch_size):
        yield to_float(part) if part.dtype == torch.uint8 else part


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each image (B, C, H, W) in [0, 1], float (B,) in dB.

    The result is inf for equal images. This and SSIM are not torchmetrics', whose import takes two seconds at the start
    of every training; the tests compare them with it.
    """

    def measure(a: Tensor, b: Tensor) -> Tensor:
        return -10 * (widest(a) - widest(b)).square().mean((1, 2, 3)).log10().float()

    return in_batches(measure, x, y)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Compute the structural similarity of each image (B, C, H, W) in [0, 1], float (B,) in [-1, 1].

    The result is 1 for equal images. As in Wang et al., 2004, the windows are Gaussians of 11 pixels with standard
    deviation 1.5; beyond the border the image is reflected, so a side must have 6 pixels or more.
    """
    line = torch.exp(-((torch.arange(_WINDOW, device=x.device) - _WINDOW // 2) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(x.shape[1], 1, _WINDOW, _WINDOW)

    def measure(a: Tensor, b: Tensor) -> Tensor:
        a, b = (F.pad(image.float(), (_WINDOW // 2,) * 4, mode="reflect") for image in (a, b))
        means = F.conv2d(torch.cat([a, b, a * a, b * b, a * b]), window, groups=a.shape[1])
        mean_a, mean_b, square_a, square_b, product = means.chunk(5)
        spread = (square_a - mean_a**2).clamp_min(0) + (square_b - mean_b**2).clamp_min(0)
        structure = (2 * (product - mean_a * mean_b) + 0.03**2) / (spread + 0.03**2)
        luminance = (2 * mean_a * mean_b + 0.01**2) / (mean_a**2 + mean_b**2 + 0.01**2)
        return (structure * luminance).mean((1, 2, 3))

    return in_batches(measure, x, y)


def in_batches(measure: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Apply `measure` to 64 pairs of images at a time and return the results (B,).

    PSNR and SSIM hold several copies of all images in memory.
    """
    if x.shape != y.shape:
        raise ValueError(f"the images need equal shapes, but have {tuple(x.shape)} and {tuple(y.shape)}")
    pairs = zip(torch.split(x, 64), torch.split(y, 64), strict=True)
    return torch.cat([measure(a, b) for a, b in pairs])


def encode_all(tokenizer: Tokenizer, images: Tensor, batch_size: int = 64) -> Tensor:
    """Encode all `images`, floats or uint8, `batch_size` at a time, to codes, int64 (N, h, w) on the host."""
    device = tokenizer.codebook.device
    with evaluation_mode(tokenizer):
        parts = [tokenizer.encode(part.to(device)).cpu() for part in float_parts(images, batch_size)]
    return torch.cat(parts)  # outside inference mode, so that the result is an ordinary tensor


def decode_all(tokenizer: Tokenizer, codes: Tensor, batch_size: int = 64) -> Tensor:
    """Decode all `codes`, `batch_size` at a time, to images, float (N, 3, H, W) in [0, 1] on the host."""
    device = tokenizer.codebook.device
    with evaluation_mode(tokenizer):
        parts = [tokenizer.decode(part.to(device)).float().cpu() for part in torch.split(codes, batch_size)]
    return torch.cat(parts).clamp(0, 1)


def predict_masked(mim: MaskedModel, tokenizer: Tokenizer, images: Tensor, mask: Tensor) -> tuple[Tensor, float]:
    """Predict the most probable codes of all masked patches in one forward pass, without sampling.

    Returns:
        the tokenizer's codes of visible patches and the predicted codes of masked patches, int64 (N, h, w) on the host;
        and the percentage of masked codes predicted correctly, NaN if no patch is masked.
    """
    device = tokenizer.codebook.device
    images, masked = images.to(device), mask.to(device=device, dtype=torch.bool)
    with evaluation_mode(mim, tokenizer):
        target = tokenizer.encode(images)
        if target.shape != masked.shape:
            raise ValueError(f"mask {tuple(masked.shape)} does not fit codes {tuple(target.shape)}")
        codes = target.clone()
        if masked.any():
            codes[masked] = mim(images, masked).argmax(dim=-1).to(codes)
    accuracy = 100 * float((codes == target)[masked].float().mean())
    return codes.cpu().clone(), accuracy  # a copy, since a tensor of inference mode cannot be changed in place


def hide(images: Tensor, mask: Tensor) -> Tensor:
    """Return `images` with masked patches painted grey, float (N, 3, H, W), to show the input of the model."""
    height, width = images.shape[-2:]
    pixel_mask = torch.nn.functional.interpolate(mask[:, None].float(), size=(height, width), mode="nearest")
    return torch.where(pixel_mask.to(images.device) > 0.5, torch.full_like(images, 0.5), images)
