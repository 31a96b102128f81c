"""Convolutional encoder and decoder of the tokenizer (PeCo section 3.1 and supplement).

The architecture follows VQGAN (arXiv 2012.09841): two residual blocks at each resolution, strided convolutions between
resolutions, GroupNorm, swish, and one self-attention at the smallest resolution. With channels
(64, 128, 256, 512, 512), 256 latent channels and 8,192 codewords, encoder and codebook have the 37.5M parameters of the
paper's Table 2; with channels (32, 64, 128, 256, 512) they have the 25.7M of the "lite" row.

B batch, H W image side, h w latent grid, C channels, D latent channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.models.group_norm import GroupNorm, convolution_layout
from pecobook.settings.tokenizer import AutoencoderConfig


class ResidualBlock(nn.Module):
    """Two times norm, swish and 3x3 convolution, plus a shortcut: (B, C_in, H, W) to (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(in_channels), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = GroupNorm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H, W)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return self.shortcut(x) + hidden  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Single-head self-attention over positions, with a residual connection: (B, C, h, w) to (B, C, h, w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.query, self.key, self.value, self.project = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h, w)."""
        normed = self.norm(x)
        query, key, value = (  # each (B, 1, h w, C): one head
            layer(normed).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, 1, h w, C)
        return x + self.project(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class Downsample(nn.Conv2d):
    """Halves the side with a strided 3x3 convolution, padded at the right and bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H / 2, W / 2)."""
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Conv2d):
    """Doubles the side by nearest-neighbour interpolation, followed by a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, 2 H, 2 W)."""
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(channels: int) -> list[nn.Module]:
    """Return the layers at the smallest resolution."""
    return [ResidualBlock(channels, channels), SelfAttention(channels), ResidualBlock(channels, channels)]


class Encoder(nn.Sequential):
    """Maps images (B, C, H, W) in [-1, 1] to latents (B, D, h, w), with h = H / stride."""

    def __init__(self, config: AutoencoderConfig) -> None:
        channels = config.channels
        layers: list[nn.Module] = [nn.Conv2d(config.in_channels, channels[0], 3, padding=1)]
        width = channels[0]
        for level, out in enumerate(channels):
            if level > 0:
                layers.append(Downsample(width))
            for _ in range(config.num_blocks):
                layers.append(ResidualBlock(width, out))
                width = out
        layers += [*_middle(width), GroupNorm(width), nn.SiLU()]
        layers.append(nn.Conv2d(width, config.latent_dim, 3, padding=1))
        if config.latent_norm:
            layers.append(LatentNorm(config.latent_dim))
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, D, h, w)."""
        return super().forward(convolution_layout(x))  # type: ignore[no-any-return, no-untyped-call]


class LatentNorm(nn.Module):
    """Normalises the vector at each position to zero mean and unit variance, in fp32: (B, D, h, w) to (B, D, h, w)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, z: Tensor) -> Tensor:
        """Map (B, D, h, w) to (B, D, h, w)."""
        return F.layer_norm(z.float().permute(0, 2, 3, 1), (self.dim,)).permute(0, 3, 1, 2)


class Decoder(nn.Sequential):
    """Mirror image of the encoder: maps quantised latents (B, D, h, w) to images (B, C, H, W), about [-1, 1]."""

    def __init__(self, config: AutoencoderConfig) -> None:
        config = config.decoder_side()
        channels = config.channels[::-1]
        width = channels[0]
        layers: list[nn.Module] = [nn.Conv2d(config.latent_dim, width, 3, padding=1), *_middle(width)]
        for level, out in enumerate(channels):
            if level > 0:
                layers.append(Upsample(width))
            for _ in range(config.num_blocks):
                layers.append(ResidualBlock(width, out))
                width = out
        layers += [GroupNorm(width), nn.SiLU(), nn.Conv2d(width, config.in_channels, 3, padding=1)]
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D, h, w) to (B, C, H, W)."""
        return super().forward(convolution_layout(x))  # type: ignore[no-any-return, no-untyped-call]
