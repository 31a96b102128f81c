"""GroupNorm that is fast in the channels-last layout on CPUs.

Convolutions on CPUs need channels last; otherwise each convolution copies the images into that layout and back. In that
layout, PyTorch's GroupNorm takes up to fifty times as long for small images with few channels per group, and its
backward pass takes three times as long in fp32 and ten to twenty times in bfloat16. This module composes GroupNorm from
operations that are fast in that layout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pecobook.utils.images import channels_last

_MIN_LARGE_PIXELS = 1024  # pixels from which PyTorch's forward pass reads whole rows of channels, which is fast


def convolution_layout(x: Tensor) -> Tensor:
    """Return x (B, C, H, W) in the layout for convolutions with GroupNorm: channels last on a CPU or if compiled.

    On a GPU, PyTorch's own GroupNorm would undo channels last. torch.compile fuses GroupNorm and SiLU into one kernel
    in whatever layout the convolutions use, so cuDNN need not copy their inputs and outputs.
    """
    return channels_last(x) if x.device.type == "cpu" or torch.compiler.is_compiling() else x


def num_groups(channels: int, group_size: int) -> int:
    """Return the largest number of groups, at most 32, that divides the channels and leaves `group_size` in each.

    VQGAN, whose GroupNorm the paper uses, has 32 groups of 4 channels at its smallest width. With 32 groups, a network
    of 32 channels normalises each channel separately: that erases the mean of the channel, and with it brightness and
    colour, and divides by almost zero on flat images. If there are fewer than `group_size` channels, one group remains.
    With `group_size` 0 the number of groups is the greatest common divisor of 32 and the channels.
    """
    if group_size == 0:
        return math.gcd(32, channels)
    return max(n for n in range(1, 33) if channels % n == 0 and (n == 1 or channels // n >= group_size))


class GroupNorm(nn.GroupNorm):
    """torch.nn.GroupNorm with the number of groups from `num_groups`.

    Args:
        channels: number of channels C.
        group_size: minimum number of channels per group; 0 for 32 groups regardless of the number of channels.
        eps: constant added to the variance.
    """

    def __init__(self, channels: int, group_size: int, eps: float = 1e-6) -> None:
        super().__init__(num_groups(channels, group_size), channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x: (B, C, H, W) to (B, C, H, W), in the layout of x."""
        use_default = (
            x.device.type != "cpu" or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
        )
        if torch.compiler.is_compiling() or use_default:  # torch.compile generates its own kernel
            return super().forward(x)
        return _ChannelsLastGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)  # type: ignore[no-any-return]


class _ChannelsLastGroupNorm(torch.autograd.Function):
    """Computes y = weight x^ + bias, with x^ = (x - mean) rstd over each group.

    In each channel, the gradient with respect to x is a linear function of dy and x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        B, C, H, W = x.shape
        laid_out = x.contiguous() if H * W < _MIN_LARGE_PIXELS else x
        y, mean, rstd = torch.native_group_norm(laid_out, weight, bias, B, C, H * W, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)  # mean and rstd are (B, groups)
        return channels_last(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        (B, C, H, W), groups = x.shape, mean.shape[1]
        dtype, count = torch.promote_types(x.dtype, torch.float32), C * H * W // groups
        mean, rstd, w = mean.to(dtype), rstd.to(dtype), weight.to(dtype)
        dy = channels_last(dy)
        sum_dy = dy.sum((2, 3), dtype=dtype)  # (B, C)
        sum_dy_x = (dy * x).sum((2, 3), dtype=dtype)  # (B, C)
        group_dy, group_dy_x = ((total * w).view(B, groups, -1).sum(2) for total in (sum_dy, sum_dy_x))
        slope = (group_dy * mean - group_dy_x) * rstd**3 / count  # (B, groups)
        offset = -slope * mean - group_dy * rstd / count
        mean, rstd, slope, offset = (value.repeat_interleave(C // groups, 1) for value in (mean, rstd, slope, offset))
        scale, slope, offset = (value[:, :, None, None].to(x.dtype) for value in (rstd * w, slope, offset))
        dx = torch.addcmul(torch.addcmul(offset, x, slope), dy, scale)
        d_weight = ((sum_dy_x - sum_dy * mean) * rstd).sum(0)
        return dx, d_weight.to(weight.dtype), sum_dy.sum(0).to(weight.dtype), None, None
