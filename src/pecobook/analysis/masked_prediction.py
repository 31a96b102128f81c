"""What a masked model believes is behind the mask: predicted codes, decoded to a picture (paper, Figures 4
and 5).

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
    """Predicted codes beside the tokenizer's own, all on the host."""

    codes: Tensor = field(repr=False)
    """int64 (B, h, w): the tokenizer's where visible, the model's most probable where masked."""
    target: Tensor = field(repr=False)
    """int64 (B, h, w): the tokenizer's everywhere."""
    mask: Tensor = field(repr=False)
    """bool (B, h, w), True = masked."""
    accuracy: float
    """Percent of the masked codes predicted exactly; NaN when nothing is masked."""


def predict_masked(mim: MaskedModel, tokenizer: Tokenizer, images: Tensor, mask: Tensor) -> MaskedPrediction:
    """Fill masked positions with the model's most probable codes, all at once, without sampling."""
    device = tokenizer.codebook.device
    images, where = images.to(device), mask.to(device=device, dtype=torch.bool)
    with evaluation_mode(mim, tokenizer):
        target = tokenizer.encode(images)
        if target.shape != where.shape:
            raise ValueError(f"mask {tuple(where.shape)} does not fit codes {tuple(target.shape)}")
        codes = target.clone()
        if where.any():
            codes[where] = mim(images, where).argmax(dim=-1).to(codes)
    right = (codes == target)[where].float()
    accuracy = 100 * float(right.mean()) if right.numel() else float("nan")
    # Copies, because tensors made under inference mode refuse later in-place work.
    return MaskedPrediction(codes.cpu().clone(), target.cpu().clone(), where.cpu().clone(), accuracy)


def decode_prediction(tokenizer: Tokenizer, prediction: MaskedPrediction, batch_size: int = 64) -> Tensor:
    """The picture that the predicted codes stand for, float (B, 3, H, W) in [0, 1] on the host."""
    return decode_all(tokenizer, prediction.codes, batch_size)


def hide(images: Tensor, mask: Tensor, grey: float = 0.5) -> Tensor:
    """`images` with masked patches painted `grey`, float (B, 3, H, W): what the model is shown."""
    height, width = images.shape[-2:]
    wide = torch.nn.functional.interpolate(mask[:, None].float(), size=(height, width), mode="nearest")
    return torch.where(wide.to(images.device) > 0.5, torch.full_like(images, grey), images)
