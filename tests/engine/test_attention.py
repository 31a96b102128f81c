"""Attention under autocast on a CPU: in fp32 where it is trained, as PyTorch has it elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from pecobook.engine.attention import trainable_attention

CPU = torch.device("cpu")


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, 17, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    return query, key, value


def dtypes_within(run: Any) -> set[torch.dtype]:
    """Of the queries that PyTorch's fused attention for CPUs sees."""
    seen: set[torch.dtype] = set()

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "scaled_dot_product" in str(func) or "_softmax" in str(func):
                seen.add(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]
        run()
    return seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_attention__is_that_of_fp32_and_comes_out_as_autocast_has_it(dtype: torch.dtype, masked: bool) -> None:
    bias = torch.linspace(-1, 1, 17 * 17, dtype=torch.double).view(17, 17) if masked else None
    given = inputs(dtype)
    with trainable_attention(CPU), torch.autocast("cpu", torch.bfloat16):
        own = None if bias is None else bias.to(dtype)
        found = F.scaled_dot_product_attention(*given, attn_mask=own, scale=0.5)
    assert found.dtype == torch.bfloat16
    torch.autograd.backward(found.float().square().sum())
    query, key, value = (one.detach().double().requires_grad_() for one in given)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.5)
    torch.autograd.backward(expected.square().sum())
    torch.testing.assert_close(found.double(), expected, atol=4e-3, rtol=1e-2)
    for one, exact in zip(given, (query, key, value), strict=True):
        assert one.grad is not None
        assert exact.grad is not None
        assert one.grad.dtype == dtype
        torch.testing.assert_close(one.grad.double(), exact.grad, atol=4e-2, rtol=2e-2)


def test_attention__is_left_alone_where_nothing_is_learned() -> None:
    given = inputs(torch.bfloat16)

    def run(*, autocast: bool, grad: bool) -> set[torch.dtype]:
        def attend() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(grad):
                F.scaled_dot_product_attention(*given)

        with trainable_attention(CPU):
            return dtypes_within(attend)

    assert run(autocast=True, grad=True) == {torch.float32}
    assert run(autocast=True, grad=False) == {torch.bfloat16}, "forward passes are faster in bfloat16"
    assert run(autocast=False, grad=True) == {torch.bfloat16}, "who does not ask for autocast keeps what it has"


def test_it_ends_with_its_context_and_is_for_cpus_alone() -> None:
    def attend() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            F.scaled_dot_product_attention(*inputs(torch.bfloat16))

    with trainable_attention(torch.device("cuda")):
        assert dtypes_within(attend) == {torch.bfloat16}
    with trainable_attention(CPU):
        assert dtypes_within(attend) == {torch.float32}
    assert dtypes_within(attend) == {torch.bfloat16}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_checkpointed_blocks_run_again_as_they_ran(name: str) -> None:
    torch.manual_seed(0)
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
    network = timm.create_model(name, **small)
    images = torch.randn(2, 3, 32, 32)

    def gradients(*, checkpointed: bool) -> list[Tensor]:
        network.zero_grad()
        with trainable_attention(CPU):
            with torch.autocast("cpu", torch.bfloat16):
                y = checkpoint(network, images, use_reentrant=False) if checkpointed else network(images)
            y.float().square().sum().backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    for one, other in zip(gradients(checkpointed=False), gradients(checkpointed=True), strict=True):
        assert torch.equal(one, other)


def test_compiled_networks_keep_to_it() -> None:
    torch.manual_seed(0)
    network = timm.layers.Attention(24, num_heads=3)
    seen: list[torch.dtype] = []

    def look(graph: Any, _inputs: Any) -> Any:
        attention = [node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target)]
        seen.extend(node.args[0].meta["val"].dtype for node in attention)
        return make_boxed_func(graph.forward)

    compiled: Any = torch.compile(network, fullgraph=True, backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    with trainable_attention(CPU), torch.autocast("cpu", torch.bfloat16):
        y = compiled(torch.randn(2, 17, 24))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert seen == [torch.float32, torch.float32], "forward and backward"
