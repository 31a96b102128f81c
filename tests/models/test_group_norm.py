"""GroupNorm in channels last: values and gradients of PyTorch's, at every size, in every precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pecobook.models.group_norm import GroupNorm, convolution_layout


def _both(
    shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0, shift: float = 0.0
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of x, weight and bias, of ours in channels last, and of PyTorch's in double precision."""
    torch.manual_seed(seed)
    x, grad = (torch.randn(shape) + shift).to(dtype), torch.randn(shape).to(dtype)
    ours = GroupNorm(shape[1])
    nn.init.normal_(ours.weight)
    nn.init.normal_(ours.bias)
    peer = nn.GroupNorm(ours.num_groups, shape[1], eps=ours.eps)
    peer.load_state_dict(ours.state_dict())
    results = []
    for norm, kind in ((ours, dtype), (peer, torch.double)):
        norm.to(torch.float32 if kind == torch.bfloat16 else kind)  # as under autocast: weights stay in fp32
        leaf = x.detach().clone().to(kind)
        leaf = (convolution_layout(leaf) if norm is ours else leaf).requires_grad_()
        out = norm(leaf)
        out.backward(grad.to(kind))
        assert leaf.grad is not None
        assert norm.weight.grad is not None
        assert norm.bias.grad is not None
        results.append([value.double() for value in (out.detach(), leaf.grad, norm.weight.grad, norm.bias.grad)])
    return results[0], results[1]


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.sampled_from([1, 5, 6, 32, 48, 64]), st.integers(2, 9), st.integers(1, 9)),
    st.integers(0, 2**16),
)
def test_group_norm__equals_pytorchs(shape: tuple[int, int, int, int], seed: int) -> None:
    for ours, peer in zip(*_both(shape, torch.double, seed), strict=True):
        assert torch.allclose(ours, peer, rtol=1e-6, atol=1e-6 * (1 + float(peer.abs().max())))


@pytest.mark.parametrize("shape", [(2, 64, 40, 33), (2, 128, 7, 5), (2, 32, 32, 32)])
@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 2**-17), (torch.bfloat16, 2**-8)])
def test_group_norm__is_exact_to_units_of_its_precision(
    shape: tuple[int, int, int, int], shift: float, dtype: torch.dtype, unit: float
) -> None:
    ours, exact = _both(shape, dtype, shift=shift)
    for name, value, true in zip(("y", "dx", "dweight", "dbias"), ours, exact, strict=True):
        assert (value - true).abs().max() < 4 * unit * true.abs().max(), name
        assert (value - true).square().mean().sqrt() < 2 * unit * true.square().mean().sqrt(), name


@pytest.mark.parametrize("side", [8, 40])
def test_group_norm__keeps_the_layout(side: int) -> None:
    x = convolution_layout(torch.randn(2, 8, side, side)).requires_grad_()
    y = GroupNorm(8)(x)
    y.sum().backward()
    assert x.grad is not None
    for tensor in (y, x.grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (48, 16), (6, 2), (5, 1)])
def test_group_norm__has_32_groups_or_what_divides(channels: int, groups: int) -> None:
    assert GroupNorm(channels).num_groups == groups
