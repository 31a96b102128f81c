"""GroupNorm that trains in channels last on CPUs.

Convolutions on CPUs want channels last: otherwise each copies its images into that layout and back. In that layout,
PyTorch's GroupNorm takes up to fifty times as long for small images with few channels a group, and its backward three
times as long in fp32, ten to twenty times in bfloat16. Here it is made of operations that are fast.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pecobook.utils.images import channels_last

_LARGE = 1024  # pixels, from which PyTorch's forward reads whole rows of channels


def convolution_layout(x: Tensor) -> Tensor:
    """(B, C, H, W) for convolutions with GroupNorm: channels last on a CPU; on a GPU PyTorch's GroupNorm undoes it."""
    return channels_last(x) if x.device.type == "cpu" else x


class GroupNorm(nn.GroupNorm):
    """torch.nn.GroupNorm with 32 groups, or as many as divide the width: (B, C, H, W) to the same.

    Args:
        channels: width.
        eps: added to the variance.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__(math.gcd(32, channels), channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same, in the layout of x."""
        usual = x.device.type != "cpu" or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last)
        if torch.compiler.is_compiling() or usual:  # compilers write their own
            return super().forward(x)
        return _ChannelsLast.apply(x, self.weight, self.bias, self.num_groups, self.eps)  # type: ignore[no-any-return]


class _ChannelsLast(torch.autograd.Function):
    """y = weight x^ + bias with x^ = (x - mean) rstd of a group: the gradient of x is linear in dy and x, channel by
    channel.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        B, C, H, W = x.shape
        seen = x.contiguous() if H * W < _LARGE else x
        y, mean, rstd = torch.native_group_norm(seen, weight, bias, B, C, H * W, groups, eps)
        ctx.save_for_backward(x, weight, mean, rstd)  # mean and rstd are (B, groups)
        return channels_last(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        (B, C, H, W), groups = x.shape, mean.shape[1]
        exact, count = torch.promote_types(x.dtype, torch.float32), C * H * W // groups
        mean, rstd, w = mean.to(exact), rstd.to(exact), weight.to(exact)
        dy = channels_last(dy)
        sum_dy = dy.sum((2, 3), dtype=exact)  # (B, C)
        sum_dy_x = (dy * x).sum((2, 3), dtype=exact)  # (B, C)
        group_dy, group_dy_x = ((one * w).view(B, groups, -1).sum(2) for one in (sum_dy, sum_dy_x))
        slope = (group_dy * mean - group_dy_x) * rstd**3 / count  # (B, groups)
        offset = -slope * mean - group_dy * rstd / count
        mean, rstd, slope, offset = (one.repeat_interleave(C // groups, 1) for one in (mean, rstd, slope, offset))
        scale, slope, offset = (one[:, :, None, None].to(x.dtype) for one in (rstd * w, slope, offset))
        dx = torch.addcmul(torch.addcmul(offset, x, slope), dy, scale)
        d_weight = ((sum_dy_x - sum_dy * mean) * rstd).sum(0)
        return dx, d_weight.to(weight.dtype), sum_dy.sum(0).to(weight.dtype), None, None
