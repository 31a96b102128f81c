"""Predictions of a masked model: codes of masked patches, decoded to an image (paper, Figures 4 and 5).

Shapes: images float (B, 3, H, W) in [0, 1]; mask bool (B, h, w), True = masked; codes int64 (B, h, w).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pecobook.analysis.arrays import MaskedModel, Tokenizer, evaluation_mode


def predict_masked(mim: MaskedModel, tokenizer: Tokenizer, images: Tensor, mask: Tensor) -> tuple[Tensor, float]:
    """Predict the most probable codes of all masked patches in one forward pass, without sampling.

    Returns:
        the tokenizer's codes of visible patches and the predicted codes of masked patches, int64 (B, h, w) on the host;
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
    """Return `images` with masked patches painted grey, float (B, 3, H, W), to show the input of the model."""
    height, width = images.shape[-2:]
    pixel_mask = torch.nn.functional.interpolate(mask[:, None].float(), size=(height, width), mode="nearest")
    return torch.where(pixel_mask.to(images.device) > 0.5, torch.full_like(images, 0.5), images)
