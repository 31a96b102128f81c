"""The nearest codeword, against all distances in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pecobook.models import nearest
from pecobook.models.nearest import nearest_codeword


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers how many elements the largest tensor had that any operation made."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out._base is None:
            self.elements = max(self.elements, out.numel())
        return out


def vectors(number: int, dim: int, seed: int) -> Tensor:
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(seed))


def oracle(z: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(z.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


@pytest.mark.parametrize(("number", "size", "dim"), [(1, 1, 1), (7, 1, 3), (500, 64, 8), (3000, 1000, 16), (0, 5, 2)])
def test_nearest_codeword__is_exact(number: int, size: int, dim: int) -> None:
    z, codebook = vectors(number, dim, 0), vectors(size, dim, 1) * torch.linspace(0.1, 3, size)[:, None]
    codes = nearest_codeword(z, codebook)
    assert codes.dtype == torch.int64
    assert codes.shape == (number,)
    assert torch.equal(codes, oracle(z, codebook))


def test_nearest_codeword__finds_every_codeword_itself() -> None:
    codebook = vectors(700, 12, 2)
    assert torch.equal(nearest_codeword(codebook, codebook), torch.arange(700))


def test_nearest_codeword__breaks_ties_by_the_smallest_index() -> None:
    codebook = torch.tensor([[9.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert nearest_codeword(torch.tensor([[0.0, 0.0], [1.0, 0.0], [-2.0, 0.0]]), codebook).tolist() == [1, 1, 2]


@pytest.mark.parametrize("number", [1023, 1024, 1025, 2048, 3001])
def test_nearest_codeword__does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    z, codebook = vectors(number, 4, 3), vectors(50, 4, 4)
    whole = nearest_codeword(z, codebook)
    monkeypatch.setattr(nearest, "_CHUNK_ELEMENTS", 1)  # the least number of rows, 1,024
    assert torch.equal(nearest_codeword(z, codebook), whole)
    assert torch.equal(whole, oracle(z, codebook))


def test_nearest_codeword__never_holds_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    number, size = 8192, 100
    monkeypatch.setattr(nearest, "_CHUNK_ELEMENTS", 2048 * size)
    with LargestTensor() as largest:
        nearest_codeword(vectors(number, 4, 0), vectors(size, 4, 1))
    assert largest.elements == 2048 * size  # so the counter sees the chunks
    assert number * size > nearest._CHUNK_ELEMENTS


def test_nearest_codeword__computes_in_single_precision_whatever_it_is_given() -> None:
    # Neighbours 0.001 apart: in bfloat16, whose steps near 1 are 0.008, they are one.
    codebook = torch.stack([torch.linspace(1, 1.1, 101), torch.ones(101)], 1)
    z = codebook + 2e-4
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (z @ z.t()).dtype == torch.bfloat16
        assert torch.equal(nearest_codeword(z, codebook), torch.arange(101))
    assert torch.equal(nearest_codeword(z.double(), codebook.double()), torch.arange(101))
    low = vectors(300, 8, 5).bfloat16()
    assert torch.equal(nearest_codeword(low, low[:40]), oracle(low, low[:40]))


def test_nearest_codeword__has_no_gradient_and_leaves_its_input() -> None:
    z, codebook = vectors(20, 3, 0).requires_grad_(), vectors(5, 3, 1).requires_grad_()
    before = z.detach().clone(), codebook.detach().clone()
    assert not nearest_codeword(z, codebook).requires_grad
    assert torch.equal(z, before[0])
    assert torch.equal(codebook, before[1])


def test_nearest_codeword__reads_a_transposed_view() -> None:
    z = vectors(6, 40, 0).t()
    assert torch.equal(nearest_codeword(z, vectors(9, 6, 1)), oracle(z, vectors(9, 6, 1)))


@pytest.mark.parametrize(("z", "codebook"), [((3, 4), (5, 3)), ((2, 3, 4), (5, 4)), ((3, 4), (4,))])
def test_nearest_codeword__refuses_shapes_that_do_not_fit(z: tuple[int, ...], codebook: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"z must be \(N, D\) and codebook \(K, D\), not"):
        nearest_codeword(torch.zeros(z), torch.zeros(codebook))
