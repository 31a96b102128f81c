"""Predictions of a masked model: codes of masked patches, decoded to an image (paper, Figures 4 and 5).

Shapes: images float (B, 3, H, W) in [0, 1]; mask bool (B, h, w), True = masked; codes int64 (B, h, w).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pecobook.analysis.arrays import MaskedModel, Tokenizer, evaluation_mode
from pecobook.analysis.reconstruction import decode_all


@dataclass(frozen=True)
class MaskedPrediction:
    """Predicted codes and the tokenizer's codes, on the host."""

    codes: Tensor = field(repr=False)
    """int64 (B, h, w): the tokenizer's codes of visible patches, the model's most probable codes of masked patches."""
    target: Tensor = field(repr=False)
    """int64 (B, h, w): the tokenizer's codes of all patches."""
    mask: Tensor = field(repr=False)
    """bool (B, h, w), True = masked."""
    accuracy: float
    """Percentage of masked codes predicted correctly; NaN if no patch is masked."""


def predict_masked(mim: MaskedModel, tokenizer: Tokenizer, images: Tensor, mask: Tensor) -> MaskedPrediction:
    """Predict the most probable codes of all masked patches in one forward pass, without sampling."""
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
    # Copies, because tensors made in inference mode do not allow in-place operations later.
    return MaskedPrediction(codes.cpu().clone(), target.cpu().clone(), masked.cpu().clone(), accuracy)


def decode_prediction(tokenizer: Tokenizer, prediction: MaskedPrediction) -> Tensor:
    """Decode predicted codes to images, float (B, 3, H, W) in [0, 1] on the host."""
    return decode_all(tokenizer, prediction.codes)


def hide(images: Tensor, mask: Tensor) -> Tensor:
    """Return `images` with masked patches painted grey, float (B, 3, H, W), to show the input of the model."""
    height, width = images.shape[-2:]
    pixel_mask = torch.nn.functional.interpolate(mask[:, None].float(), size=(height, width), mode="nearest")
    return torch.where(pixel_mask.to(images.device) > 0.5, torch.full_like(images, 0.5), images)
