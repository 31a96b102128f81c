"""Attention that trains faster than PyTorch's under autocast, on a CPU and on a GPU."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pecobook.settings.training import AttentionKernel

_is_used = False


@contextmanager
def trainable_attention(device: torch.device, kernel: AttentionKernel = "sdpa") -> Iterator[None]:
    """Compute attention under autocast in fp32 on a CPU, and with `kernel` on a GPU.

    The backward pass of PyTorch's fused attention for CPUs takes two to 25 times as long in bfloat16 as in fp32 (more
    with fewer tokens), so a small ViT would train at half its speed or less. On a GPU, `kernel` "triton" computes
    attention with a learned bias using `pecobook.models.attention_triton`; other attention stays PyTorch's. The context
    must also enclose the backward pass, because checkpointed blocks run again there.
    """
    rules = {"cpu": _in_fp32} if kernel == "sdpa" else {"cpu": _in_fp32, "cuda": _in_triton}
    if os.environ.get("TRITON_INTERPRET") == "1" and kernel == "triton":  # Triton's interpreter, which needs no GPU
        rules["cpu"] = _in_triton
    if device.type not in rules or (rules[device.type] is _in_triton and find_spec("triton") is None):
        yield
        return
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device.type]
    with torch.library._scoped_library("aten", "IMPL") as library:
        # PyTorch before 2.8 replaces a rule without this argument.
        allowed = {"allow_override": True} if "allow_override" in inspect.signature(library.impl).parameters else {}
        library.impl("scaled_dot_product_attention", rules[device.type], key, **allowed)
        yield


def idle_kernel(kernel: AttentionKernel) -> str:
    """Return a warning if `kernel` is ours and has not been used yet in this process; otherwise an empty string."""
    if kernel == "sdpa" or _is_used:
        return ""
    return (
        "Warning: --attention triton computes nothing here, so PyTorch's kernels do. It is for relative positions that "
        "are learned (BEiT's), up to 256 tokens, on a GPU with Triton and --precision bf16 or fp16."
    )


def _in_fp32(*args: Any, **kwargs: Any) -> Tensor:
    """Replace PyTorch's autocast rule for attention on CPUs, which computes everything in the lower precision."""
    return _attend("cpu", torch.float32 if torch.is_grad_enabled() else torch.get_autocast_dtype("cpu"), args, kwargs)


def _in_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Replace PyTorch's autocast rule for attention on GPUs wherever our kernel can compute it."""
    global _is_used
    from pecobook.models.attention_triton import biased_attention, takes

    place = query.device.type
    dtype = torch.get_autocast_dtype(place)
    if takes(query, key, value, attn_mask) and not (dropout_p or is_causal or kwargs.get("enable_gqa")):
        assert attn_mask is not None
        _is_used = True
        scale = kwargs.get("scale") or query.shape[-1] ** -0.5
        with torch.autocast(place, enabled=False):
            return biased_attention(
                query.to(dtype), key.to(dtype), value.to(dtype), attn_mask.reshape(attn_mask.shape[-3:]), scale
            )
    return _attend(place, dtype, (query, key, value, attn_mask, dropout_p, is_causal), kwargs)


def _attend(place: str, dtype: torch.dtype, args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Compute attention with PyTorch in `dtype`; the result has the autocast type."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    autocast_dtype = torch.get_autocast_dtype(place)
    with torch.autocast(place, enabled=False):
        output = F.scaled_dot_product_attention(*map(cast, args), **{name: cast(kwargs[name]) for name in kwargs})
    return output.to(autocast_dtype)
