"""Attention that trains fast on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def trainable_attention(device: torch.device) -> Iterator[None]:
    """Compute attention under autocast in fp32 on a CPU; on other devices nothing changes.

    The backward pass of PyTorch's fused attention for CPUs takes two to 25 times as long in bfloat16 as in fp32 (the
    fewer tokens, the more), so a small ViT would train at half its speed or less. The context must enclose the backward
    pass too, because checkpointed blocks run again there.
    """
    if device.type != "cpu":
        yield
        return
    with torch.library._scoped_library("aten", "IMPL") as rules:
        rules.impl("scaled_dot_product_attention", _attention, "AutocastCPU", allow_override=True)
        yield


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """Replace PyTorch's autocast rule for attention on CPUs, which computes everything in the lower precision."""
    autocast_dtype = torch.get_autocast_dtype("cpu")
    dtype = torch.float32 if torch.is_grad_enabled() else autocast_dtype

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    with torch.autocast("cpu", enabled=False):
        output = F.scaled_dot_product_attention(*map(cast, args), **{name: cast(kwargs[name]) for name in kwargs})
    return output.to(autocast_dtype)
