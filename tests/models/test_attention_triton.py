"""Attention under a bias that learns, through Triton's interpreter here and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

# The interpreter is chosen by the environment before Triton is imported, so it has a process of its own.
_SETUP = """
import torch
import torch.nn.functional as F
from pecobook.engine.attention import idle_kernel, trainable_attention
from pecobook.models import attention_triton
from pecobook.models.attention_triton import biased_attention

DEVICE = torch.device({device!r})
LOW = torch.bfloat16

def error(found, wanted):
    return float((found.detach().double() - wanted).norm() / wanted.norm().clamp_min(1e-9))

def errors(B, H, N, D, dtype):
    generator = torch.Generator().manual_seed(N)
    packed = torch.randn(B, N, 3, H, D, generator=generator).to(DEVICE, dtype)
    tensors = [part.detach().requires_grad_() for part in packed.permute(2, 0, 3, 1, 4).unbind(0)]
    tensors.append(torch.randn(H, N, N, generator=generator).to(DEVICE).requires_grad_())
    grad = torch.randn(B, H, N, D, generator=generator).to(DEVICE, dtype)
    out = biased_attention(*tensors, 0.3)
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    found = (out, *torch.autograd.grad(out, tensors, grad))
    assert [x.dtype for x in found] == [dtype] * 4 + [torch.float32]
    q, k, v, bias = exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = (0.3 * q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
    wanted = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    return max(error(a, b) for a, b in zip(found, wanted))

def gradients(network, images, kernel, compiled=False):
    run = torch.compile(network, backend="aot_eager") if compiled else network
    network.zero_grad()
    calls.clear()
    with trainable_attention(DEVICE, kernel):
        with torch.autocast(DEVICE.type, LOW):
            out = run(images)
        out = out[-1] if isinstance(out, list) else out
        out.float().square().mean().backward()
    return torch.cat([p.grad.double().flatten() for p in network.parameters() if p.grad is not None])

calls = []
launch = attention_triton._launch
attention_triton._launch = lambda q: (calls.append(tuple(q.shape)), launch(q))[1]
"""
_CASES = """
for B, H, N, D in ((1, 1, 3, 4), (2, 3, 17, 8), (3, 2, 65, 16), (1, 1, 197, 64), (1, 1, 130, 80), (1, 1, 256, 128)):
    assert errors(B, H, N, D, torch.float32) < {fp32}, (B, H, N, D)
    found = errors(B, H, N, D, LOW)
    assert found < 0.01, (B, H, N, D, found)
"""
_NETWORKS = """
import timm
from pecobook.models.dense.pyramid import FeaturePyramid
from pecobook.settings.dense import PyramidConfig

torch.manual_seed(0)
small = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=0)
shared = dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True, init_values=0.1)
images = torch.randn(2, 3, 32, 32, device=DEVICE)

def network(**more):
    net = timm.create_model("beit_base_patch16_224", **{{**small, **more}}).to(DEVICE)
    for name, parameter in net.named_parameters():
        if "relative_position" in name:
            torch.nn.init.normal_(parameter)
    return net

for more in (shared, {{**shared, "use_rel_pos_bias": True}}):
    net = network(**more)
    wanted = gradients(net, images, "sdpa")
    assert not calls
    assert bool(idle_kernel("triton")) == (more is shared), "before its first use alone"
    for compiled in (False, True):
        assert error(gradients(net, images, "triton", compiled), wanted) < 0.03, (more, compiled)
        assert calls == [(2, 3, 17, 8)] * 6, (calls, "three blocks, forward and backward")

pyramid = FeaturePyramid(network(depth=8), 64, PyramidConfig(window=4)).to(DEVICE).train()
images = torch.randn(1, 3, 48, 40, device=DEVICE)
wanted = gradients(pyramid, images, "sdpa")
assert error(gradients(pyramid, images, "triton"), wanted) < 0.03
assert (4, 3, 17, 8) in calls, "windows"

# What the kernel does not compute is PyTorch's: no gradient, no bias, long sequences, dropout.
q = torch.randn(1, 2, 300, 8, device=DEVICE, dtype=LOW).requires_grad_()
bias = torch.randn(1, 2, 300, 300, device=DEVICE).requires_grad_()
calls.clear()
with trainable_attention(DEVICE, "triton"), torch.autocast(DEVICE.type, LOW):
    for n, mask, dropout in ((300, bias, 0.0), (64, None, 0.0), (64, bias[..., :64, :64].detach(), 0.0),
                             (64, bias[..., :64, :64].expand(1, 2, 64, 64), 0.5)):
        part = q[:, :, :n]
        found = F.scaled_dot_product_attention(part, part, part, attn_mask=mask, dropout_p=dropout)
        assert found.dtype == LOW
        if not dropout:
            x = part.double()
            plain = F.scaled_dot_product_attention(x, x, x, attn_mask=None if mask is None else mask.double())
            assert error(found, plain.detach()) < 0.02
assert not calls
"""


def run(program: str, device: str, **values: object) -> None:
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if device == "cpu" else {})}
    text = (_SETUP + program + 'print("done")').format(device=device, **values)
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "done"


def test_kernels__equal_fp64_and_networks_follow_the_setting_in_the_interpreter() -> None:
    run(_CASES + _NETWORKS, "cpu", fp32=3e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("program", [_CASES, _NETWORKS])
def test_on_a_gpu(program: str) -> None:
    run(program, "cuda", fp32=1e-3)  # products in TF32
