"""Nearest codeword on CUDA in one kernel: distances stay in registers, and only N indices are written to memory.

Each program processes BLOCK_N vectors and loops over the codebook in blocks of BLOCK_K codewords, as attention kernels
loop over keys; products are summed over D in blocks of BLOCK_D. For each vector, the program keeps the smallest score
and its codeword's index.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _nearest_kernel(  # type: ignore[no-untyped-def]
    z_ptr,
    codebook_ptr,
    half_norms_ptr,
    codes_ptr,
    N,
    K,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # 64-bit offsets: N D can exceed 2^31 when a whole data set is encoded at once.
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # (BLOCK_N,)
    offset = tl.arange(0, BLOCK_D)
    best = tl.full((BLOCK_N,), float("inf"), tl.float32)
    code = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, K, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)  # (BLOCK_K,)
        product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for d in range(0, D, BLOCK_D):
            inside = (d + offset) < D
            left = tl.load(
                z_ptr + row[:, None] * D + (d + offset)[None, :], mask=(row < N)[:, None] & inside[None, :], other=0.0
            )  # (BLOCK_N, BLOCK_D)
            right = tl.load(
                codebook_ptr + column[None, :].to(tl.int64) * D + (d + offset)[:, None],
                mask=(column < K)[None, :] & inside[:, None],
                other=0.0,
            )  # (BLOCK_D, BLOCK_K)
            if INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16 as if they were integers
                left, right = left.to(tl.float32), right.to(tl.float32)
            product = tl.dot(left, right, product, input_precision=PRECISION)
        norms = tl.load(half_norms_ptr + column, mask=column < K, other=float("inf"))
        score = norms[None, :] - product  # (BLOCK_N, BLOCK_K)
        block_best, index = tl.min(score, 1, return_indices=True)  # ties go to the smallest index
        better = block_best < best
        best = tl.where(better, block_best, best)
        code = tl.where(better, start + index.to(tl.int32), code)
    tl.store(codes_ptr + row, code.to(tl.int64), mask=row < N)


# BLOCK_N, BLOCK_K, BLOCK_D, number of warps and number of stages. The first entries are the fastest on an H200
# (`benchmarks.nearest --tune`); the others fit into GPUs with less shared memory.
_TILES: dict[str, tuple[tuple[int, int, int, int, int], ...]] = {
    "fp32": ((128, 128, 64, 8, 3), (64, 128, 32, 4, 3), (64, 64, 32, 4, 2)),
    "tf32": ((128, 256, 32, 8, 3), (128, 128, 32, 8, 2), (64, 64, 32, 4, 2)),
    "bf16": ((128, 256, 64, 8, 3), (128, 128, 64, 8, 2), (64, 64, 64, 4, 2)),
}
_TILE_NAMES = "BLOCK_N", "BLOCK_K", "BLOCK_D", "num_warps", "num_stages"

# An fp32 product is split into three TF32 products on tensor cores, which are as accurate as a sum in fp32 and on an
# H200 take a fifth of the time of fp32 products without tensor cores.
_PRODUCTS = {"fp32": "tf32x3", "tf32": "tf32", "bf16": "ieee"}


def _choose_tiles(precision: str, device: torch.device) -> dict[str, int]:
    """Return the first block sizes whose stages fit into shared memory; the last fit every GPU that Triton supports."""
    memory = float("inf")  # Triton's interpreter has no limit
    if device.type == "cuda":
        memory = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 2**16)
    width = 2 if precision == "bf16" else 4
    fitting = (tile for tile in _TILES[precision] if (tile[0] + tile[1]) * tile[2] * tile[4] * width < memory)
    return dict(zip(_TILE_NAMES, next(fitting, _TILES[precision][-1]), strict=True))


def nearest_fused(z: Tensor, codebook: Tensor, precision: str, tiles: dict[str, int] | None = None) -> Tensor:
    """Return the codes int64 (N,) of fp32 vectors z (N, D) for codewords (K, D); see `pecobook.models.nearest`.

    Args:
        z: (N, D) vectors, fp32.
        codebook: (K, D) codewords, fp32.
        precision: `fp32`, `tf32` or `bf16`.
        tiles: block sizes of the kernel, and optionally `PRECISION`, the precision of its products. For tuning, and for
            Triton's interpreter, which is faster with a few large blocks. None chooses them for the device.
    """
    z, codebook = z.contiguous(), codebook.contiguous()
    N, D = z.shape
    codes = torch.empty(N, dtype=torch.int64, device=z.device)
    if N == 0:
        return codes
    half_norms = codebook.square().sum(1).mul_(0.5)  # (K,)
    settings: dict[str, Any] = {"PRECISION": _PRODUCTS[precision], **(tiles or _choose_tiles(precision, z.device))}
    if precision == "bf16":
        z, codebook = z.bfloat16(), codebook.bfloat16()
    # Triton launches kernels on the current device, which can differ from the device of the tensors.
    with torch.cuda.device(z.device) if z.is_cuda else nullcontext():
        _nearest_kernel[(triton.cdiv(N, settings["BLOCK_N"]),)](
            z, codebook, half_norms, codes, N, len(codebook), D, INTERPRETED=not z.is_cuda, **settings
        )
    return codes
