"""Attention under autocast on a CPU: fp32 where it is trained, PyTorch's own precision elsewhere."""

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
    """Return the types of the queries that PyTorch's fused attention for CPUs gets within `run`."""
    dtypes: set[torch.dtype] = set()

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "scaled_dot_product" in str(func) or "_softmax" in str(func):
                dtypes.add(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]
        run()
    return dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_attention__equals_fp32_and_returns_the_type_of_autocast(dtype: torch.dtype, masked: bool) -> None:
    bias = torch.linspace(-1, 1, 17 * 17, dtype=torch.double).view(17, 17) if masked else None
    tensors = inputs(dtype)
    with trainable_attention(CPU), torch.autocast("cpu", torch.bfloat16):
        mask = None if bias is None else bias.to(dtype)
        output = F.scaled_dot_product_attention(*tensors, attn_mask=mask, scale=0.5)
    assert output.dtype == torch.bfloat16
    torch.autograd.backward(output.float().square().sum())
    query, key, value = (tensor.detach().double().requires_grad_() for tensor in tensors)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.5)
    torch.autograd.backward(expected.square().sum())
    torch.testing.assert_close(output.double(), expected, atol=4e-3, rtol=1e-2)
    for tensor, exact in zip(tensors, (query, key, value), strict=True):
        assert tensor.grad is not None
        assert exact.grad is not None
        assert tensor.grad.dtype == dtype
        torch.testing.assert_close(tensor.grad.double(), exact.grad, atol=4e-2, rtol=2e-2)


def test_attention__is_unchanged_without_gradient_or_autocast() -> None:
    tensors = inputs(torch.bfloat16)

    def run(*, autocast: bool, grad: bool) -> set[torch.dtype]:
        def attend() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(grad):
                F.scaled_dot_product_attention(*tensors)

        with trainable_attention(CPU):
            return dtypes_within(attend)

    assert run(autocast=True, grad=True) == {torch.float32}
    assert run(autocast=True, grad=False) == {torch.bfloat16}, "forward passes are faster in bfloat16"
    assert run(autocast=False, grad=True) == {torch.bfloat16}, "without autocast the type does not change"


def test_the_rule_ends_with_its_context_and_applies_to_cpus_alone() -> None:
    def attend() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            F.scaled_dot_product_attention(*inputs(torch.bfloat16))

    with trainable_attention(torch.device("cuda")):
        assert dtypes_within(attend) == {torch.bfloat16}
    with trainable_attention(CPU):
        assert dtypes_within(attend) == {torch.float32}
    assert dtypes_within(attend) == {torch.bfloat16}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_checkpointed_blocks_give_the_same_gradients(name: str) -> None:
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

    for plain, checkpointed in zip(gradients(checkpointed=False), gradients(checkpointed=True), strict=True):
        assert torch.equal(plain, checkpointed)


def test_compiled_networks_follow_the_rule() -> None:
    torch.manual_seed(0)
    network = timm.layers.Attention(24, num_heads=3)
    dtypes: list[torch.dtype] = []

    def inspect(graph: Any, _inputs: Any) -> Any:
        attention = [node for node in graph.graph.nodes if "scaled_dot_product" in str(node.target)]
        dtypes.extend(node.args[0].meta["val"].dtype for node in attention)
        return make_boxed_func(graph.forward)

    compiled: Any = torch.compile(
        network, fullgraph=True, backend=aot_autograd(fw_compiler=inspect, bw_compiler=inspect)
    )
    with trainable_attention(CPU), torch.autocast("cpu", torch.bfloat16):
        y = compiled(torch.randn(2, 17, 24))
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert dtypes == [torch.float32, torch.float32], "forward and backward"
