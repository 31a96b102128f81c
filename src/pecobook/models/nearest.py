"""Nearest codeword by Euclidean distance (PeCo, equations 1 and 2) without ever holding all N x K distances.

    argmin_k ||z - e_k||^2 = argmin_k s_k,   s_k = ||e_k||^2 / 2 - z . e_k,   since ||z||^2 is the same for all k

Three ways to the same indices: a Triton kernel on CUDA (`nearest_triton`, whose fp32 is three products of TF32), a
bfloat16 search whose few candidates are compared again in fp32 on CPUs that multiply bfloat16, and chunks of fp32
distances everywhere else.

N vectors, K codewords, D dimension.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from pecobook.settings.tokenizer import SearchPrecision
from pecobook.utils.devices import exporting

# Elements of a distance matrix held at once. On 2 cores 4,096 rows of 8,192 were fastest in fp32, and 256 rows
# fragmented the heap; of the bfloat16 search, whose pieces should stay in the cache, 1,024.
_CHUNK_ELEMENTS = 4096 * 8192
_SEARCH_ELEMENTS = 1024 * 8192
_SEARCH_FROM = 1024  # codewords from which a search in bfloat16 pays for its preparation
_FOLD = 128  # columns of a folded distance matrix
_MOST_CANDIDATES = 8  # a row, on average over a chunk, before the chunk is done in fp32 as a whole
_ROUNDOFF = 2.0**-8  # of bfloat16, relative


def nearest_codeword(z: Tensor, codebook: Tensor, *, precision: SearchPrecision = "fp32") -> Tensor:
    """Index of the codeword nearest to each vector.

    Args:
        z: (N, D) vectors.
        codebook: (K, D) codewords.
        precision: of the products, whatever autocast says. `fp32` gives exact indices; `tf32` and `bf16` are faster on
            a GPU and miss where two codewords are about equally near; elsewhere they are fp32.

    Returns:
        int64 (N,), each in [0, K). Ties go to the smallest index.

    Raises:
        ValueError: the shapes do not fit.
    """
    if z.ndim != 2 or codebook.ndim != 2 or z.shape[1] != codebook.shape[1]:
        raise ValueError(f"z must be (N, D) and codebook (K, D), not {tuple(z.shape)} and {tuple(codebook.shape)}.")
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        z, codebook = z.detach().float(), codebook.detach().float()
        if exporting():  # one expression for any N, which other runtimes know
            return _scores(z, codebook, _half_norms(codebook)).argmin(1)
        if torch.compiler.is_compiling():
            codes: Tensor = _operator(z, codebook, precision)
            return codes
        return _nearest(z, codebook, precision)


def _nearest(z: Tensor, codebook: Tensor, precision: str) -> Tensor:
    if z.is_cuda and find_spec("triton") is not None:
        from pecobook.models.nearest_triton import nearest_fused

        return nearest_fused(z, codebook, precision)
    if z.device.type == "cpu" and len(codebook) >= _SEARCH_FROM and torch.cpu._is_avx512_bf16_supported():
        return _nearest_by_search(z, codebook)
    return _nearest_by_chunks(z, codebook)


# One operator to torch.compile, whose graphs it does not break. Not called otherwise, since it takes half a millisecond
# to call and a second to call first.
_operator = torch.library.custom_op("pecobook::nearest_codeword", _nearest, mutates_args=())


@_operator.register_fake
def _(z: Tensor, codebook: Tensor, precision: str) -> Tensor:  # noqa: ARG001
    return z.new_empty(len(z), dtype=torch.int64)


def _half_norms(codebook: Tensor) -> Tensor:
    return codebook.square().sum(1).mul_(0.5)  # (K,)


def _scores(z: Tensor, codebook: Tensor, half_norms: Tensor) -> Tensor:
    return torch.addmm(half_norms, z, codebook.t(), alpha=-1)  # (N, K)


def _nearest_by_chunks(z: Tensor, codebook: Tensor) -> Tensor:
    half_norms = _half_norms(codebook)
    codes = torch.empty(len(z), dtype=torch.int64, device=z.device)
    rows = max(1024, _CHUNK_ELEMENTS // max(len(codebook), 1))
    for start in range(0, len(z), rows):
        torch.argmin(_scores(z[start : start + rows], codebook, half_norms), 1, out=codes[start : start + rows])
    return codes


# ------------------------------------------------------------------------- search in bfloat16, decision in fp32


def _nearest_by_search(z: Tensor, codebook: Tensor) -> Tensor:
    """Exact indices from bfloat16 products, which are twice as fast.

    A bfloat16 product of z and e_k is off by at most (2 u + u^2) ||z|| ||e_k||, u = 2^-8 (each factor is rounded once;
    Cauchy and Schwarz). Subtracting that gives lower bounds of all s_k. Whatever codeword has the least lower bound,
    its exact s is an upper bound of the minimum; only codewords whose lower bound lies under it can be nearest: about
    two of 8,192. Those are compared in fp32.
    """
    centre = codebook.mean(0)  # distances do not change with it, and the error bound shrinks with the norms
    z, codebook = z - centre, codebook - centre
    half_norms = _half_norms(codebook)
    left, right = _bound_factors(z, codebook, half_norms)
    codes = torch.empty(len(z), dtype=torch.int64)
    rows = max(256, _SEARCH_ELEMENTS // len(codebook))
    for start in range(0, len(z), rows):
        part = slice(start, start + rows)
        codes[part] = _search(z[part], codebook, half_norms, left[part] @ right)
    return codes


def _bound_factors(z: Tensor, codebook: Tensor, half_norms: Tensor) -> tuple[Tensor, Tensor]:
    """Bfloat16 (N, D') and (D', K'), K' a multiple of the fold, whose product is the lower bounds of all s_k.

    Beside z and -e they hold ||e_k||^2 / 2 in three pieces, which add up to its 24 bits, and the error bound.
    """
    K, D = codebook.shape
    pad = -K % _FOLD
    columns = [-codebook]
    rest = torch.nn.functional.pad(half_norms, (0, pad), value=torch.finfo(torch.bfloat16).max)  # padding is far away
    for _ in range(3):
        piece = rest.bfloat16().float()
        columns.append(piece[:, None])
        rest = rest - piece
    # Rounded up, since a bound must not shrink; 1% more covers the summation in fp32.
    error = (2 * _ROUNDOFF + _ROUNDOFF**2) * 1.01 * (1 + 2 * _ROUNDOFF) ** 2
    columns.append(-torch.nn.functional.pad(codebook.norm(dim=1) * error, (0, pad))[:, None])
    columns[0] = torch.nn.functional.pad(columns[0], (0, 0, 0, pad))
    right = torch.cat([*columns, codebook.new_zeros(K + pad, -(D + 4) % 32)], 1).bfloat16()  # whole vector registers
    ones = z.new_ones(len(z), 3)
    zeros = z.new_zeros(len(z), right.shape[1] - D - 4)
    left = torch.cat([z, ones, z.norm(dim=1, keepdim=True), zeros], 1).bfloat16()
    return left, right.t()


def _search(z: Tensor, codebook: Tensor, half_norms: Tensor, lower: Tensor) -> Tensor:
    """Codes of z (n, D), given lower bounds (n, K') in bfloat16."""
    n = len(z)
    folded = lower.view(n, -1, _FOLD)  # (n, K' / F, F): minima over the middle axis are vector instructions
    least = folded.amin(1)  # (n, F)
    column = least.argmin(1)  # (n,)
    every = torch.arange(n)
    first = folded[every, :, column].argmin(1) * _FOLD + column  # (n,) where the lower bound is least
    first.clamp_(max=len(codebook) - 1)  # not-a-number may point into the padding
    upper = half_norms[first] - (z * codebook[first]).sum(1)  # (n,) exact
    # The bounds themselves were rounded to bfloat16, by u of their size; x + u |x| grows with x.
    limit = (upper + 1.01 * _ROUNDOFF * upper.abs())[:, None]
    row, column = (least <= limit).nonzero().unbind(1)
    where = (folded[row, :, column] <= limit[row]).nonzero()
    row, code = row[where[:, 0]], where[:, 1] * _FOLD + column[where[:, 0]]
    if len(row) > _MOST_CANDIDATES * n:  # codewords are closer to each other than bfloat16 can tell
        return _scores(z, codebook, half_norms).argmin(1)
    exact = half_norms[code] - (z[row] * codebook[code]).sum(1)  # (candidates,)
    best = upper.scatter_reduce(0, row, exact, "amin")  # (n,)
    hit = exact == best[row]
    found = torch.full((n,), len(codebook)).scatter_reduce_(0, row[hit], code[hit], "amin")
    return torch.where(found < len(codebook), found, first)
