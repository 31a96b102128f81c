"""Plain transformers as encoder and decoder of the tokenizer (PeCo, row ViT-B / ViT-B of Table 12).

The blocks are timm's. Positions are fixed two-dimensional sines and cosines, computed for the grid of each input, so
images of any size that is a multiple of the patch side work.

B batch, N = h w patches, C width, P side of a patch, D latent channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pecobook.models.autoencoder import LatentNorm
from pecobook.settings.tokenizer import AutoencoderConfig


class _Trunk(nn.Sequential):
    """Adds positions to tokens, then applies transformer blocks and a final norm: (B, C, h, w) to (B, C, h, w)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        from timm.models.vision_transformer import Block

        width = config.channels[0]
        blocks = [Block(width, config.num_heads, qkv_bias=True) for _ in range(config.num_blocks)]
        super().__init__(*blocks, nn.LayerNorm(width, eps=1e-6))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h, w)."""
        B, C, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2) + sincos_positions(h, w, C, device=x.device).to(x.dtype)  # (B, N, C)
        for layer in self:
            tokens = layer(tokens)
        return tokens.transpose(1, 2).reshape(B, C, h, w)


class ViTEncoder(nn.Sequential):
    """Maps images (B, 3, H, W) in [-1, 1] to latents (B, D, h, w), with h = H / P."""

    def __init__(self, config: AutoencoderConfig) -> None:
        width, patch = config.channels
        layers = [
            nn.Conv2d(config.in_channels, width, patch, stride=patch),
            _Trunk(config),
            nn.Conv2d(width, config.latent_dim, 1),
        ]
        super().__init__(*layers, *([LatentNorm(config.latent_dim)] if config.latent_norm else []))


class ViTDecoder(nn.Sequential):
    """Maps quantised latents (B, D, h, w) to images (B, 3, h P, w P), about [-1, 1], or to `features` (B, F, h, w)."""

    def __init__(self, config: AutoencoderConfig, features: int = 0) -> None:
        config = config.decoder_side()
        width, patch = config.channels
        layers = [nn.Conv2d(config.latent_dim, width, 1), _Trunk(config)]
        if features:
            super().__init__(*layers, nn.Conv2d(width, features, 1))
        else:
            pixels = nn.Conv2d(width, config.in_channels * patch**2, 1)
            super().__init__(*layers, pixels, nn.PixelShuffle(patch))


def sincos_positions(height: int, width: int, channels: int, *, device: torch.device) -> Tensor:
    """Return sines and cosines of row and column, with wavelengths from 2 pi to 20,000 pi.

    Args:
        height: number of rows.
        width: number of columns.
        channels: a multiple of 4: a quarter each for the sine and the cosine of the column and of the row.
        device: device of the result.

    Returns:
        (height x width, channels), fp32.
    """
    from timm.layers import build_sincos2d_pos_embed

    return build_sincos2d_pos_embed([height, width], dim=channels, device=device)  # type: ignore[no-any-return]
