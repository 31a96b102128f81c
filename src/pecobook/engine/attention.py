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
    """To train within: on a CPU, attention under autocast is computed in fp32; elsewhere nothing changes.

    PyTorch's fused attention has a backward pass for CPUs that takes two to 25 times as long in bfloat16 as in fp32
    (the fewer tokens, the more), so that a small ViT trained at half its speed or less. It must enclose the backward
    pass, too, in which checkpointed blocks run again.
    """
    if device.type != "cpu":
        yield
        return
    with torch.library._scoped_library("aten", "IMPL") as rules:
        rules.impl("scaled_dot_product_attention", _attention, "AutocastCPU", allow_override=True)
        yield


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    """Autocast's rule for attention on CPUs, in place of PyTorch's, by which all is in lower precision."""
    low = torch.get_autocast_dtype("cpu")
    dtype = torch.float32 if torch.is_grad_enabled() else low

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    with torch.autocast("cpu", enabled=False):
        mixed = F.scaled_dot_product_attention(*map(cast, args), **{name: cast(kwargs[name]) for name in kwargs})
    return mixed.to(low)
