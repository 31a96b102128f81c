"""Convolutional encoder and decoder of the tokenizer (PeCo section 3.1 and supplement).

The architecture follows VQGAN (arXiv 2012.09841): two residual blocks at each resolution, strided convolutions between
resolutions, GroupNorm, swish, and one self-attention layer at the smallest resolution. With channels (64, 128, 256,
512, 512), 256 latent channels and 8,192 codewords, encoder and codebook have the 37.5M parameters of the paper's Table
2; with channels (32, 64, 128, 256, 512) they have the 25.7M of the "lite" row.

B batch, H W image side, h w latent grid, C channels, D latent channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.models.group_norm import GroupNorm, convolution_layout
from pecobook.settings.tokenizer import AutoencoderConfig, PaddingMode
from pecobook.utils.devices import exporting


class ResidualBlock(nn.Module):
    """Norm, swish and 3x3 convolution, twice, plus a shortcut: (B, C_in, H, W) to (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, config: AutoencoderConfig) -> None:
        super().__init__()
        self.norm1 = GroupNorm(in_channels, config.group_size)
        self.conv1 = Convolution(in_channels, out_channels, config.padding)
        self.norm2 = GroupNorm(out_channels, config.group_size)
        self.conv2 = Convolution(out_channels, out_channels, config.padding)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H, W)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return self.shortcut(x) + hidden  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Single-head self-attention over positions, with a residual connection: (B, C, h, w) to (B, C, h, w)."""

    def __init__(self, channels: int, group_size: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, group_size)
        self.query, self.key, self.value, self.project = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h, w)."""
        normed = self.norm(x)
        query, key, value = (  # each (B, 1, h w, C): one head
            layer(normed).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)  # (B, 1, h w, C)
        return x + self.project(mixed.squeeze(1).transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


class Convolution(nn.Conv2d):
    """3x3 convolution that keeps the side, or halves it with stride 2, then padding only the right and bottom."""

    def __init__(self, in_channels: int, out_channels: int, padding: PaddingMode, *, stride: int = 1) -> None:
        inside = padding == "zeros" and stride == 1  # the convolution itself reads zeros faster than it pads
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=int(inside))
        self.border = "constant" if padding == "zeros" else padding
        self.sides = () if inside else (int(stride == 1), 1, int(stride == 1), 1)  # left, right, top, bottom

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        return super().forward(_pad(x, self.sides, self.border) if self.sides else x)


def _pad(x: Tensor, sides: tuple[int, ...], mode: str) -> Tensor:
    """Pad by one pixel at the sides that are 1: left, right, top, bottom.

    A single row or column, which has no neighbour to reflect, is repeated. PyTorch's reflection refuses this, also in
    ONNX files, which take any size, so these read the image by its indices.

    PyTorch's compiler assumes that the gradient of a repeated border is contiguous, and fails if it is channels last
    (PyTorch 2.14). A compiled border is therefore joined from slices, which is equivalent, but slower if not compiled.
    """
    height, width = x.shape[-2:]
    if mode == "reflect" and (exporting() or min(height, width) == 1):
        left, right, top, bottom = sides
        return x[..., _reflected(height, top, bottom, x.device)[:, None], _reflected(width, left, right, x.device)]
    if mode != "replicate" or not torch.compiler.is_compiling():
        return F.pad(x, sides, mode=mode)
    left, right, top, bottom = sides
    x = torch.cat([x[..., :left], x, x[..., x.shape[-1] - right :]], -1)
    return torch.cat([x[..., :top, :], x, x[..., x.shape[-2] - bottom :, :]], -2)


def _reflected(size: int, before: int, after: int, device: torch.device) -> Tensor:
    """Return the row indices that reflection padding reads from `size` rows: int64 (before + size + after,)."""
    rows = torch.arange(-before, size + after, device=device).abs()
    return (size - 1 - (size - 1 - rows).abs()).clamp_min(0)


class Upsample(Convolution):
    """Doubles the side with nearest-neighbour interpolation, followed by a 3x3 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, 2 H, 2 W)."""
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(channels: int, config: AutoencoderConfig) -> list[nn.Module]:
    """Return the layers at the smallest resolution."""
    blocks = [ResidualBlock(channels, channels, config) for _ in range(2)]
    return [blocks[0], SelfAttention(channels, config.group_size), blocks[1]]


class Encoder(nn.Sequential):
    """Maps images (B, C, H, W) in [-1, 1] to latents (B, D, h, w), with h = H / stride."""

    def __init__(self, config: AutoencoderConfig) -> None:
        channels = config.channels
        layers: list[nn.Module] = [Convolution(config.in_channels, channels[0], config.padding)]
        width = channels[0]
        for level, out in enumerate(channels):
            if level > 0:
                layers.append(Convolution(width, width, config.padding, stride=2))
            for _ in range(config.num_blocks):
                layers.append(ResidualBlock(width, out, config))
                width = out
        layers += [*_middle(width, config), GroupNorm(width, config.group_size), nn.SiLU()]
        layers.append(Convolution(width, config.latent_dim, config.padding))
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
    """Mirror image of the encoder: maps quantised latents (B, D, h, w) to images (B, C, H, W), about [-1, 1].

    With `features` it maps them to that many channels (B, F, h, w) instead, with the layers of the smallest resolution.
    """

    def __init__(self, config: AutoencoderConfig, features: int = 0) -> None:
        config = config.decoder_side()
        channels = config.channels[:-2:-1] if features else config.channels[::-1]
        width = channels[0]
        layers: list[nn.Module] = [Convolution(config.latent_dim, width, config.padding), *_middle(width, config)]
        for level, out in enumerate(channels):
            if level > 0:
                layers.append(Upsample(width, width, config.padding))
            for _ in range(config.num_blocks):
                layers.append(ResidualBlock(width, out, config))
                width = out
        layers += [
            GroupNorm(width, config.group_size),
            nn.SiLU(),
            Convolution(width, features or config.in_channels, config.padding),
        ]
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, D, h, w) to (B, C, H, W), or to (B, F, h, w)."""
        return super().forward(convolution_layout(x))  # type: ignore[no-any-return, no-untyped-call]
