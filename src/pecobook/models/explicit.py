"""Semantics put into codewords explicitly, for the comparison in Table 6: a loss on codewords instead of on images.

B images, D latent channels, h w latent grid. Both losses see the image's codewords averaged over positions, as the
codeword probe of Table 4 does. What else these losses are, the paper does not say: docs/decisions.md.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.models.contrastive import contrastive_loss, ema_update, mlp
from pecobook.models.quantizer import VectorQuantizer
from pecobook.settings.codebook import ExplicitConfig


class CodewordClassifier(nn.Linear):
    """Cross-entropy of a linear classifier on averaged codewords.

    Args:
        dim: D.
        num_classes: of the labels.
    """

    def loss(self, quantized: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy, () each, of codewords (B, D, h, w) with their gradient; labels int64 (B,)."""
        logits = self(quantized.mean((2, 3))).float()  # (B, classes)
        return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()


class CodewordContrast(nn.Module):
    """MoCo v3's loss on averaged codewords: an image's must find those of another view of it among all images'.

    The keys come from an encoder that is a moving average of the trained one, through the same codebook.

    Args:
        encoder: the trained one, of which a copy is taken.
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
    def keys(self, other: Tensor, quantizer: VectorQuantizer) -> Tensor:
        """What images are told apart by, (B, out), of another view of them: (B, C, H, W) in [-1, 1]."""
        codewords = quantizer.nearest(self.momentum_encoder(other))  # (B, D, h, w)
        keys: Tensor = self.momentum_projector(codewords.mean((2, 3)))
        return keys

    def loss(self, quantized: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy, () each, of codewords (B, D, h, w) with their straight-through gradient.

        The first B of the keys (N, out) belong to them.
        """
        queries = self.predictor(self.projector(quantized.mean((2, 3))))
        return contrastive_loss(queries, keys, self.config.temperature)

    def after_step(self, encoder: nn.Module) -> None:
        """Move encoder and projector of the keys towards the trained ones."""
        ema_update(self.momentum_encoder, encoder, self.config.momentum)
        ema_update(self.momentum_projector, self.projector, self.config.momentum)
