"""Attention with one bias for all images, in Triton: for short sequences with a learned bias, such as BEiT's.

PyTorch's flash and cuDNN kernels refuse a mask that requires a gradient. Its memory-efficient kernel accepts one, but
writes the gradient of the mask for every image (126 MB per block for ViT-B at batch 128) and sums it afterwards. Here a
program keeps the scores of a tile of queries for all keys in registers, and sums the bias's gradient over images there.

Three kernels: the output; the gradients of queries and bias; the gradients of keys and values. The scores are
recomputed in the backward pass from the log-sum-exp of each row, as in FlashAttention (arXiv 2205.14135).

B batch, H heads, N tokens, D head dimension.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TOKENS = 256
"""Largest N: the scores of a tile of queries stay in registers. ViTs with patches of 16 have 197 tokens at 224 pixels,
as do windows of 14 x 14."""
MAX_WIDTH = 128
"""Largest D."""
_ROWS = 64
"""Number of queries (in the last kernel, keys) per program."""
_MULTIPROCESSORS = 132
"""Those of an H100 or H200; they determine how many programs share the images when the bias's gradient is summed."""


@triton.jit  # type: ignore[untyped-decorator]
def _tile(base, rows, columns, stride, N, D, FLOAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load a tile (rows, D) of one head; zeros outside."""
    inside = (rows[:, None] < N) & (columns[None, :] < D)
    tile = tl.load(base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    if FLOAT:  # Triton's interpreter multiplies the bits of bfloat16 as if they were integers
        tile = tile.to(tl.float32)
    return tile


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, image_stride, head_stride, token_stride, N, H, D, scale,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    image, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keys, columns = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    offset = image * image_stride + head * head_stride
    q = _tile(q_ptr + offset, rows, columns, token_stride, N, D, FLOAT)
    k = _tile(k_ptr + offset, keys, columns, token_stride, N, D, FLOAT)
    v = _tile(v_ptr + offset, keys, columns, token_stride, N, D, FLOAT)
    inside = (rows[:, None] < N) & (keys[None, :] < N)
    bias = tl.load(bias_ptr + head * N * N + rows[:, None] * N + keys[None, :], mask=inside, other=0.0)
    scores = tl.where(keys[None, :] < N, tl.dot(q, tl.trans(k)) * scale + bias, -float("inf"))
    largest = tl.max(scores, 1)
    weights = tl.exp(scores - largest[:, None])
    total = tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v) / total[:, None]
    place = out_ptr + image * N * H * D + head * D + rows[:, None] * H * D + columns[None, :]
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=(rows[:, None] < N) & (columns[None, :] < D))
    tl.store(lse_ptr + tl.program_id(1).to(tl.int64) * N + rows, largest + tl.log(total), mask=rows < N)


@triton.jit  # type: ignore[untyped-decorator]
def _query_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, bias_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, dbias_ptr,
    image_stride, head_stride, token_stride, B, N, H, D, scale, GROUPS,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """One tile of one head's queries, in every GROUPS-th image."""
    head, group = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    keys, columns = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    inside = (rows[:, None] < N) & (keys[None, :] < N)
    place = head * N * N + rows[:, None] * N + keys[None, :]
    bias = tl.load(bias_ptr + place, mask=inside, other=0.0)
    dbias = tl.zeros((ROWS, TOKENS), tl.float32)
    for number in range(group, B, GROUPS):
        image = number + tl.zeros((), tl.int64)
        offset = image * image_stride + head * head_stride
        own = image * N * H * D + head * D  # of gradients, whose layout is (B, N, H, D)
        q = _tile(q_ptr + offset, rows, columns, token_stride, N, D, FLOAT)
        k = _tile(k_ptr + offset, keys, columns, token_stride, N, D, FLOAT)
        v = _tile(v_ptr + offset, keys, columns, token_stride, N, D, FLOAT)
        grad = _tile(grad_ptr + own, rows, columns, H * D, N, D, FLOAT)
        lse = tl.load(lse_ptr + (image * H + head) * N + rows, mask=rows < N, other=0.0)
        delta = tl.load(delta_ptr + (image * N + rows) * H + head, mask=rows < N, other=0.0)
        scores = tl.dot(q, tl.trans(k)) * scale + bias
        weights = tl.where(inside, tl.exp(scores - lse[:, None]), 0.0)
        dscores = weights * (tl.dot(grad, tl.trans(v)) - delta[:, None])
        dbias += dscores
        dq = tl.dot(dscores.to(k.dtype), k) * scale
        tl.store(
            dq_ptr + own + rows[:, None] * H * D + columns[None, :],
            dq.to(dq_ptr.dtype.element_ty),
            mask=(rows[:, None] < N) & (columns[None, :] < D),
        )
    tl.store(dbias_ptr + group * H * N * N + place, dbias, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _key_kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, bias_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    image_stride, head_stride, token_stride, N, H, D, scale,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one head of one image. Matrices are (keys, queries)."""
    image, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    queries, columns = tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    inside = (rows[:, None] < N) & (queries[None, :] < N)
    offset = image * image_stride + head * head_stride
    own = image * N * H * D + head * D
    k = _tile(k_ptr + offset, rows, columns, token_stride, N, D, FLOAT)
    v = _tile(v_ptr + offset, rows, columns, token_stride, N, D, FLOAT)
    q = _tile(q_ptr + offset, queries, columns, token_stride, N, D, FLOAT)
    grad = _tile(grad_ptr + own, queries, columns, H * D, N, D, FLOAT)
    bias = tl.load(bias_ptr + head * N * N + queries[None, :] * N + rows[:, None], mask=inside, other=0.0)
    lse = tl.load(lse_ptr + tl.program_id(1).to(tl.int64) * N + queries, mask=queries < N, other=0.0)
    delta = tl.load(delta_ptr + (image * N + queries) * H + head, mask=queries < N, other=0.0)
    weights = tl.where(inside, tl.exp(tl.dot(k, tl.trans(q)) * scale + bias - lse[None, :]), 0.0)
    dv = tl.dot(weights.to(grad.dtype), grad)
    dscores = weights * (tl.dot(v, tl.trans(grad)) - delta[None, :])
    dk = tl.dot(dscores.to(q.dtype), q) * scale
    place = own + rows[:, None] * H * D + columns[None, :]
    written = (rows[:, None] < N) & (columns[None, :] < D)
    tl.store(dk_ptr + place, dk.to(dk_ptr.dtype.element_ty), mask=written)
    tl.store(dv_ptr + place, dv.to(dv_ptr.dtype.element_ty), mask=written)


def _launch(q: Tensor) -> tuple[int, Any, dict[str, Any]]:
    """Return the number of tiles, the device context, and the settings of all kernels."""
    _, _, N, D = q.shape
    sizes = {"ROWS": _ROWS, "TOKENS": max(triton.next_power_of_2(N), 16), "WIDTH": max(triton.next_power_of_2(D), 16)}
    # Triton launches kernels on the current device, which can differ from the device of the tensors.
    device = torch.cuda.device(q.device) if q.is_cuda else nullcontext()
    return triton.cdiv(N, _ROWS), device, {**sizes, "FLOAT": not q.is_cuda, "num_warps": 8, "num_stages": 1}


def _like(q: Tensor) -> Tensor:
    """Return an empty tensor (B, H, N, D) stored as (B, N, H, D), which a projection reads without a copy."""
    B, H, N, D = q.shape
    return q.new_empty(B, N, H, D).transpose(1, 2)


@torch.library.custom_op("pecobook::biased_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, H, N, D = q.shape
    out, lse = _like(q), torch.empty(B, H, N, dtype=torch.float32, device=q.device)
    tiles, device, settings = _launch(q)
    with device:
        _forward_kernel[(tiles, B * H)](
            q, k, v, bias, out, lse, q.stride(0), q.stride(1), q.stride(2), N, H, D, scale, **settings
        )
    return out, lse


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return _like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


@torch.library.custom_op("pecobook::biased_attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, lse: Tensor, grad: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, N, D = q.shape
    grad = grad.transpose(1, 2).contiguous()  # (B, N, H, D)
    delta = (grad.float() * out.transpose(1, 2).float()).sum(-1)  # (B, N, H)
    tiles, device, settings = _launch(q)
    groups = min(B, max(1, 4 * _MULTIPROCESSORS // (H * tiles)))
    dq, dk, dv = _like(q), _like(q), _like(q)
    parts = torch.empty(groups, H, N, N, dtype=torch.float32, device=q.device)
    inputs, strides = (q, k, v, bias, grad, lse, delta), (q.stride(0), q.stride(1), q.stride(2))
    with device:
        _query_kernel[(tiles, H, groups)](*inputs, dq, parts, *strides, B, N, H, D, scale, groups, **settings)
        _key_kernel[(tiles, B * H)](*inputs, dk, dv, *strides, N, H, D, scale, **settings)
    return dq, dk, dv, parts.sum(0)


@_attention_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, lse: Tensor, grad: Tensor, scale: float  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(q), _like(q), _like(q), torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Tensor | None, ...]:
    return (*_attention_backward(*ctx.saved_tensors, grad, ctx.scale), None)


_attention.register_autograd(_backward, setup_context=_save)


def takes(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Return whether `biased_attention` supports this attention: its shapes, and a bias that requires a gradient."""
    if bias is None or not bias.requires_grad or q.ndim != 4:
        return False
    _, H, N, _ = q.shape
    fits = bias.shape in ((H, N, N), (1, H, N, N)) and q.shape[2] <= MAX_TOKENS and q.shape[3] <= MAX_WIDTH
    return fits and q.shape == k.shape == v.shape and q.stride() == k.stride() == v.stride() and q.stride(3) == 1


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Return softmax(scale q k^T + bias) v, with gradients for all four.

    Args:
        q: queries (B, H, N, D) with the same strides as `k` and `v`; D is dense. N at most 256, D at most 128.
        k: keys (B, H, N, D).
        v: values (B, H, N, D).
        bias: (H, N, N), one for all images; computed in fp32.
        scale: factor on the products.

    Returns:
        (B, H, N, D) with the type of `v`.
    """
    out, _ = _attention(q, k, v, bias.float().contiguous(), scale)
    return out  # type: ignore[no-any-return]
