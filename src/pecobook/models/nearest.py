"""Nearest codeword by Euclidean distance (PeCo, equations 1 and 2), without holding all N x K distances at once.

    argmin_k ||z - e_k||^2 = argmin_k s_k,   s_k = ||e_k||^2 / 2 - z . e_k,   since ||z||^2 is the same for all k

Three methods compute the same indices: a Triton kernel on CUDA (`nearest_triton`, whose fp32 product consists of three
TF32 products); on CPUs that prefer bfloat16, a bfloat16 search whose few candidates are compared again in fp32; and
chunks of fp32 distances everywhere else.

N vectors, K codewords, D dimension.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from pecobook.settings.tokenizer import SearchPrecision
from pecobook.utils.devices import cpu_prefers_bf16, exporting

# Number of elements of the distance matrix that are stored at once. On 2 cores, 4,096 rows of 8,192 were fastest in
# fp32, and 256 rows fragmented the heap; for the bfloat16 search, whose chunks should stay in the cache, 1,024 rows
# were fastest.
CHUNK_ELEMENTS = 4096 * 8192
_SEARCH_ELEMENTS = 1024 * 8192
_MIN_SEARCH_CODEWORDS = 1024  # number of codewords from which a search in bfloat16 is worth its preparation
_FOLD = 128  # number of columns of a folded distance matrix
_MAX_CANDIDATES = 8  # mean number of candidates in a row, above which the whole chunk is computed in fp32
_ROUNDOFF = 2.0**-8  # relative rounding error of bfloat16


def nearest_codeword(z: Tensor, codebook: Tensor, *, precision: SearchPrecision = "fp32") -> Tensor:
    """Return the index of the nearest codeword for each vector.

    Args:
        z: (N, D) vectors.
        codebook: (K, D) codewords.
        precision: precision of the products, independent of autocast. `fp32` gives exact indices; `tf32` and `bf16` are
            faster on a GPU and can return another codeword that is about equally near. Other devices always use fp32.

    Returns:
        int64 (N,), each in [0, K). Ties go to the smallest index.

    Raises:
        ValueError: the shapes do not match.
    """
    if z.ndim != 2 or codebook.ndim != 2 or z.shape[1] != codebook.shape[1]:
        raise ValueError(f"z must be (N, D) and codebook (K, D), not {tuple(z.shape)} and {tuple(codebook.shape)}.")
    with torch.no_grad(), torch.autocast("cpu" if z.is_meta else z.device.type, enabled=False):
        z, codebook = z.detach().float(), codebook.detach().float()
        if exporting():  # one expression for any N, of operators that other runtimes support
            return _scores(z, codebook, _half_norms(codebook)).argmin(1)
        if torch.compiler.is_compiling():
            codes: Tensor = _operator(z, codebook, precision)
            return codes
        return _nearest(z, codebook, precision)


def _nearest(z: Tensor, codebook: Tensor, precision: str) -> Tensor:
    if z.is_cuda and find_spec("triton") is not None:
        from pecobook.models.nearest_triton import nearest_fused

        return nearest_fused(z, codebook, precision)
    if z.device.type == "cpu" and len(codebook) >= _MIN_SEARCH_CODEWORDS and cpu_prefers_bf16():
        return nearest_by_search(z, codebook)
    return nearest_by_chunks(z, codebook)


# torch.compile sees one operator, which does not break the graph. Uncompiled code does not call the operator, since a
# call adds half a millisecond, and the first call a second.
_operator = torch.library.custom_op("pecobook::nearest_codeword", _nearest, mutates_args=())


@_operator.register_fake
def _(z: Tensor, codebook: Tensor, precision: str) -> Tensor:  # noqa: ARG001
    return z.new_empty(len(z), dtype=torch.int64)


def _half_norms(codebook: Tensor) -> Tensor:
    return codebook.square().sum(1).mul_(0.5)  # (K,)


def _scores(z: Tensor, codebook: Tensor, half_norms: Tensor) -> Tensor:
    return torch.addmm(half_norms, z, codebook.t(), alpha=-1)  # (N, K)


def nearest_by_chunks(z: Tensor, codebook: Tensor) -> Tensor:
    """Search exhaustively, with only some vectors' scores in memory at a time: (N, D) and (K, D) to int64 (N,)."""
    half_norms = _half_norms(codebook)
    codes = torch.empty(len(z), dtype=torch.int64, device=z.device)
    rows = max(128, CHUNK_ELEMENTS // max(len(codebook), 1))
    for start in range(0, len(z), rows):
        torch.argmin(_scores(z[start : start + rows], codebook, half_norms), 1, out=codes[start : start + rows])
    return codes


# ------------------------------------------------------------------------- search in bfloat16, decision in fp32


def nearest_by_search(z: Tensor, codebook: Tensor) -> Tensor:
    """Return exact indices from bfloat16 products, which are twice as fast.

    The error of a bfloat16 product of z and e_k is at most (2 u + u^2) ||z|| ||e_k||, u = 2^-8 (each factor is rounded
    once; Cauchy-Schwarz inequality). Subtracting it gives lower bounds on all s_k. The exact s of the codeword with the
    smallest lower bound is an upper bound on the minimum. Only codewords whose lower bound does not exceed this upper
    bound can be nearest: about two of 8,192. These candidates are compared in fp32.
    """
    centre = codebook.mean(0)  # subtracting it keeps the distances and reduces the norms, and so the error bound
    z, codebook = z - centre, codebook - centre
    half_norms = _half_norms(codebook)
    left, right = _bound_factors(z, codebook, half_norms)
    codes = torch.empty(len(z), dtype=torch.int64)
    rows = max(256, _SEARCH_ELEMENTS // len(codebook))
    for start in range(0, len(z), rows):
        chunk = slice(start, start + rows)
        codes[chunk] = _search(z[chunk], codebook, half_norms, left[chunk] @ right)
    return codes


def _bound_factors(z: Tensor, codebook: Tensor, half_norms: Tensor) -> tuple[Tensor, Tensor]:
    """Return bfloat16 matrices (N, D') and (D', K') whose product contains the lower bounds of all s_k.

    K' is K rounded up to a multiple of the fold. Besides z and -e, the matrices contain ||e_k||^2 / 2 as three bfloat16
    summands, which together keep all 24 bits, and the error bound.
    """
    K, D = codebook.shape
    pad = -K % _FOLD
    columns = [-codebook]
    # The padding has the largest value, so that it is never the nearest codeword.
    remainder = torch.nn.functional.pad(half_norms, (0, pad), value=torch.finfo(torch.bfloat16).max)
    for _ in range(3):
        summand = remainder.bfloat16().float()
        columns.append(summand[:, None])
        remainder = remainder - summand
    # The error is rounded up, since rounding must not make the bound smaller; 1% more covers the summation in fp32.
    error = (2 * _ROUNDOFF + _ROUNDOFF**2) * 1.01 * (1 + 2 * _ROUNDOFF) ** 2
    columns.append(-torch.nn.functional.pad(codebook.norm(dim=1) * error, (0, pad))[:, None])
    columns[0] = torch.nn.functional.pad(columns[0], (0, 0, 0, pad))
    right = torch.cat(
        [*columns, codebook.new_zeros(K + pad, -(D + 4) % 32)], 1
    ).bfloat16()  # fills whole vector registers
    ones = z.new_ones(len(z), 3)
    zeros = z.new_zeros(len(z), right.shape[1] - D - 4)
    left = torch.cat([z, ones, z.norm(dim=1, keepdim=True), zeros], 1).bfloat16()
    return left, right.t()


def _search(z: Tensor, codebook: Tensor, half_norms: Tensor, lower: Tensor) -> Tensor:
    """Return the codes of z (n, D), given lower bounds of all s_k, bfloat16 (n, K')."""
    n = len(z)
    folded = lower.view(n, -1, _FOLD)  # (n, K' / F, F): minima over the middle axis are vector instructions
    least = folded.amin(1)  # (n, F)
    column = least.argmin(1)  # (n,)
    first = folded[torch.arange(n), :, column].argmin(1) * _FOLD + column  # (n,) code with the smallest lower bound
    first.clamp_(max=len(codebook) - 1)  # with NaN, the index can lie in the padding
    upper = half_norms[first] - (z * codebook[first]).sum(1)  # (n,) exact
    # The lower bounds were rounded to bfloat16, with relative error u; x + u |x| is monotonic in x.
    limit = (upper + 1.01 * _ROUNDOFF * upper.abs())[:, None]
    row, column = (least <= limit).nonzero().unbind(1)
    candidates = (folded[row, :, column] <= limit[row]).nonzero()
    row, code = row[candidates[:, 0]], candidates[:, 1] * _FOLD + column[candidates[:, 0]]
    if len(row) > _MAX_CANDIDATES * n:  # codewords are closer to each other than bfloat16 can resolve
        return _scores(z, codebook, half_norms).argmin(1)
    exact = half_norms[code] - (z[row] * codebook[code]).sum(1)  # (candidates,)
    best = upper.scatter_reduce(0, row, exact, "amin")  # (n,)
    is_best = exact == best[row]
    codes = torch.full((n,), len(codebook)).scatter_reduce_(0, row[is_best], code[is_best], "amin")
    return torch.where(codes < len(codebook), codes, first)
