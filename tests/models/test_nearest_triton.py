"""The CUDA kernel, through Triton's interpreter here and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from pecobook.models.nearest import nearest_codeword
from pecobook.settings.tokenizer import SearchPrecision

# The interpreter is chosen by the environment before Triton is imported, so it has a process of its own.
_PROGRAM = """
import torch
from pecobook.models.nearest_triton import nearest_fused

def draw(number, dim, seed):
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(seed))

tiles = {"BLOCK_N": 256, "BLOCK_K": 1024, "BLOCK_D": 64}
for N, K, D in ((1, 1, 1), (0, 3, 2), (70, 33, 5), (257, 1025, 65), (300, 1000, 40), (256, 8192, 256)):
    z, codebook = draw(N, D, 0), draw(K, D, 1)
    distances = torch.cdist(z.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    exact = distances.argmin(1)
    for settings in ((tiles, None) if N * K < 10_000 else (tiles,)):
        codes = nearest_fused(z, codebook, "fp32", settings)
        assert codes.dtype == torch.int64 and torch.equal(codes, exact), (N, K, D, settings)
        near = nearest_fused(z, codebook, "bf16", settings)
        # What bfloat16 chose is nearly as near.
        least = distances.gather(1, exact[:, None]).square()
        chosen = distances.gather(1, near[:, None]).square()
        slack = 2 ** -6 * z.norm(dim=1, keepdim=True) * codebook.norm(dim=1).max()
        assert (chosen <= least + slack).all(), (N, K, D, settings)
        assert not len(near) or (near == exact).float().mean() > 0.95, (N, K, D, settings)
        assert torch.equal(nearest_fused(z, codebook, "tf32", settings), exact)

# Ties go to the smallest index, within a block and from block to block. Quarters are exact in fp32, in any order of
# sums; of other numbers some processors' matrix products give equal columns other last bits.
twice = draw(40, 8, 2).mul(4).round().div(4).repeat(2, 1)
assert twice[:40].unique(dim=0).shape[0] == 40
for settings in (tiles, {**tiles, "BLOCK_K": 16}):
    assert torch.equal(nearest_fused(twice[:40], twice, "fp32", settings), torch.arange(40)), settings
strided = draw(8, 90, 3).t()
assert torch.equal(nearest_fused(strided, draw(33, 8, 4), "fp32", tiles),
                   nearest_fused(strided.contiguous(), draw(33, 8, 4), "fp32", tiles))
print("done")
"""


def test_kernel__in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "done"


def tf32(x: Tensor) -> Tensor:
    """What a tensor core keeps of fp32: ten bits after the first."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize(("dim", "offset", "spread"), [(256, 0.0, 1.0), (32, 0.0, 1.0), (256, 5.0, 0.3)])
def test_three_products__miss_no_more_than_fp32(dim: int, offset: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    centre = offset * torch.randn(1, dim, generator=generator)
    z, codebook = (centre + spread * torch.randn(n, dim, generator=generator) for n in (1024, 4096))
    half_norms = codebook.square().sum(1) / 2

    def misses(products: Tensor) -> int:
        return int(((half_norms - products).argmin(1) != exact).sum())

    exact = (codebook.double().square().sum(1) / 2 - z.double() @ codebook.double().t()).argmin(1)
    high, high_codebook = tf32(z), tf32(codebook)
    low, low_codebook = tf32(z - high), tf32(codebook - high_codebook)
    three = low @ high_codebook.t() + high @ low_codebook.t() + high @ high_codebook.t()
    assert misses(three) <= misses(z @ codebook.t()) + 2
    assert offset == 0 or misses(high @ high_codebook.t()) > 20  # while one product alone does


@pytest.mark.gpu
@pytest.mark.parametrize(("number", "size", "dim"), [(1, 1, 1), (257, 1025, 65), (12_544, 8192, 256), (1000, 8192, 32)])
@pytest.mark.parametrize(("precision", "agreement"), [("fp32", 0.9999), ("tf32", 0.99), ("bf16", 0.95)])
def test_kernel__on_a_gpu(number: int, size: int, dim: int, precision: SearchPrecision, agreement: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z, codebook = torch.randn(number, dim, generator=generator), torch.randn(size, dim, generator=generator)
    exact = nearest_codeword(z, codebook)
    torch.cuda.reset_peak_memory_stats()
    z, codebook = z.cuda(), codebook.cuda()
    before = torch.cuda.memory_allocated()
    codes = nearest_codeword(z, codebook, precision=precision)
    assert (codes.cpu() == exact).float().mean() >= agreement
    assert torch.cuda.max_memory_allocated() - before < 16 * (number + size * (dim + 2)) + 2**20  # and not N x K
