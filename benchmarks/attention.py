"""Attention of a ViT whose relative positions learn (BEiT's), forward and backward, by several kernels in one run.

    python -m benchmarks.attention                                  # one H100 or H200: ViT-B at 224 pixels, batch 128
    TRITON_INTERPRET=1 python -m benchmarks.attention --toy         # a CPU: checks the script, its times mean nothing

`pecobook` is `--attention triton`. The rows without a bias, or with one that does not learn, show what could be saved
at most. Errors are relative to fp64 for the first image: of the output, and of all gradients together.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.runs import least_seconds
from pecobook.models.attention_triton import biased_attention
from pecobook.utils import devices

Attention = Callable[..., Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype)[None])


def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return biased_attention(q, k, v, bias, q.shape[-1] ** -0.5)


def flex() -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out: Tensor = compiled(q, k, v, score_mod=lambda score, _b, head, i, j: score + bias[head, i, j])
        return out

    return attend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("batch-size", 128), ("heads", 12), ("tokens", 197), ("width", 64), ("repeats", 10)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--toy", action="store_true")
    sizes = parser.parse_args()
    if sizes.toy:
        sizes.batch_size, sizes.heads, sizes.repeats = 2, 2, 1
    device = devices.device()
    torch.manual_seed(0)
    packed = torch.randn(sizes.batch_size, sizes.tokens, 3, sizes.heads, sizes.width, device=device).bfloat16()
    bias = torch.randn(sizes.heads, sizes.tokens, sizes.tokens, device=device).requires_grad_()
    rows: dict[str, tuple[Attention, Tensor]] = {
        "PyTorch, bias learns": (sdpa, bias),
        "pecobook, bias learns": (ours, bias),
        "PyTorch, bias is fixed": (sdpa, bias.detach()),
        "PyTorch, no bias": (lambda q, k, v, _: F.scaled_dot_product_attention(q, k, v), bias),
    }
    if not sizes.toy:
        rows["FlexAttention, bias learns"] = (flex(), bias)
    print("| attention | forward, ms | backward, ms | error, output | error, gradients |\n|---|---|---|---|---|")
    for name, (attend, used) in rows.items():
        try:
            print(f"| {name} | {' | '.join(measure(attend, packed, used, sizes.repeats, device))} |", flush=True)
        except Exception as error:  # a kernel that this GPU or PyTorch does not have
            print(f"| {name} | failed: {type(error).__name__}: {str(error)[:100]} |", flush=True)


def measure(attend: Attention, packed: Tensor, bias: Tensor, repeats: int, device: torch.device) -> list[str]:
    def parts(batch: Tensor) -> list[Tensor]:
        return [part.detach().requires_grad_() for part in batch.permute(2, 0, 3, 1, 4).unbind(0)]

    def learned(tensors: list[Tensor], used: Tensor) -> list[Tensor]:
        return [*tensors, *([used] if used.requires_grad else [])]

    tensors = parts(packed)
    out = attend(*tensors, bias)
    grad = torch.randn_like(out)
    forward = least_seconds(lambda: attend(*tensors, bias), device, repeats=repeats)
    inputs = learned(tensors, bias)
    backward = least_seconds(
        lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True, allow_unused=True), device, repeats=repeats
    )
    one = parts(packed[:1])
    found = attend(*one, bias)
    output = found.detach().double()
    q, k, v = exact = parts(packed[:1].double())
    exact_bias = bias.detach().double().requires_grad_(bias.requires_grad)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=exact_bias[None])
    gradients = torch.autograd.grad(found, learned(one, bias), grad[:1], allow_unused=True)
    exact_gradients = torch.autograd.grad(wanted, learned(exact, exact_bias), grad[:1].double())
    if any(gradient is None for gradient in gradients):  # no bias: another function
        return [f"{1000 * forward:.3f}", f"{1000 * backward:.3f}", "-", "-"]
    pairs = list(zip(gradients, exact_gradients, strict=True))
    difference, size = (
        torch.cat([x.flatten() for x in xs]).norm() for xs in zip(*[(a - b, b) for a, b in pairs], strict=True)
    )
    error = (output - wanted.detach()).norm() / wanted.detach().norm()
    return [f"{1000 * forward:.3f}", f"{1000 * backward:.3f}", f"{float(error):.1e}", f"{float(difference / size):.1e}"]


if __name__ == "__main__":
    main()
