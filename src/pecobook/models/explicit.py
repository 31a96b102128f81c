"""Losses that put semantics into codewords explicitly, for Table 6: a loss on codewords instead of one on images.

Both losses use an image's codewords averaged over positions, as the codeword probe of Table 4 does. The paper gives no
further details of these losses; docs/decisions.md lists our choices.

B images, D latent channels, h w latent grid.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.models.contrastive import contrastive_loss, ema_update, mlp
from pecobook.models.control_quantizers import ControlQuantizer
from pecobook.models.quantizer import VectorQuantizer
from pecobook.settings.codebook import ExplicitConfig


class CodewordClassifier(nn.Linear):
    """Linear classifier on averaged codewords, trained with cross-entropy.

    Args:
        dim: D.
        num_classes: number of classes.
    """

    def loss(self, quantized: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute loss and accuracy, () each, for codewords (B, D, h, w) with gradient and labels int64 (B,)."""
        logits = self(quantized.mean((2, 3))).float()  # (B, classes)
        return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()


class CodewordContrast(nn.Module):
    """MoCo v3's loss on averaged codewords: two views of an image must match among the views of all images.

    The keys are computed with a moving average of the trained encoder and the same codebook.

    Args:
        encoder: the encoder being trained; a copy becomes the momentum encoder.
        dim: D.
        config: widths of the heads, temperature and momentum.
    """

    def __init__(self, encoder: nn.Module, dim: int, config: ExplicitConfig) -> None:
        super().__init__()
        self.config = config
        hidden, out = config.hidden_dim, config.output_dim
        self.projector = mlp([dim, hidden, out], final_norm=True)
        self.predictor = mlp([out, hidden, out], final_norm=False)
        self.momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @torch.no_grad()
    def keys(self, second_view: Tensor, quantizer: VectorQuantizer | ControlQuantizer) -> Tensor:
        """Compute the keys (B, out) of the second view of the images, (B, C, H, W) in [-1, 1]."""
        codewords = quantizer.nearest(self.momentum_encoder(second_view))  # (B, D, h, w)
        keys: Tensor = self.momentum_projector(codewords.mean((2, 3)))
        return keys

    def loss(self, quantized: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Compute loss and accuracy, () each, for codewords (B, D, h, w) with straight-through gradient.

        The first B of the keys (N, out) are the positives of the codewords.
        """
        queries = self.predictor(self.projector(quantized.mean((2, 3))))
        return contrastive_loss(queries, keys, self.config.temperature)

    def after_step(self, encoder: nn.Module) -> None:
        """Update the momentum encoder and projector. Call it after each optimizer step."""
        ema_update(self.momentum_encoder, encoder, self.config.momentum)
        ema_update(self.momentum_projector, self.projector, self.config.momentum)
