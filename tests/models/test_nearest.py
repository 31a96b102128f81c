"""The nearest codeword, against all distances in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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
    monkeypatch.setattr(nearest, "CHUNK_ELEMENTS", 1)  # the least number of rows, 1,024
    assert torch.equal(nearest_codeword(z, codebook), whole)
    assert torch.equal(whole, oracle(z, codebook))


def test_nearest_codeword__never_holds_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    number, size = 8192, 100
    monkeypatch.setattr(nearest, "CHUNK_ELEMENTS", 2048 * size)
    with LargestTensor() as largest:  # inside the operator, which is one thing from outside
        nearest.nearest_by_chunks(vectors(number, 4, 0), vectors(size, 4, 1))
    assert largest.elements == 2048 * size  # so the counter sees the chunks
    assert number * size > nearest.CHUNK_ELEMENTS


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


# ------------------------------------------------------------------------- search in bfloat16, decision in fp32


def gap(z: Tensor, codebook: Tensor, codes: Tensor) -> float:
    """How much farther the chosen codewords are than the nearest, as a share of what fp32 can resolve."""
    distances = torch.cdist(z.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    chosen = distances.gather(1, codes[:, None])[:, 0]
    scale = (z.double() - codebook.double().mean(0)).norm(dim=1) * codebook.double().norm(dim=1).max()
    return float(((chosen - distances.amin(1)) / (scale + 1e-30)).max())


@pytest.mark.parametrize(("number", "size", "dim"), [(1, 1024, 8), (5, 1025, 16), (600, 2000, 40), (3000, 1500, 256)])
def test_search__is_exact(number: int, size: int, dim: int) -> None:
    z, codebook = vectors(number, dim, 0), vectors(size, dim, 1)
    assert torch.equal(nearest.nearest_by_search(z, codebook), oracle(z, codebook))
    assert torch.equal(nearest.nearest_by_search(codebook, codebook), torch.arange(size))


@given(
    scale=st.floats(-3, 3),
    spread=st.floats(-3, 1),
    offset=st.floats(-100, 100),
    clusters=st.integers(1, 50),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60)
def test_search__of_any_data_is_as_near_as_fp32_can_tell(
    scale: float, spread: float, offset: float, clusters: int, seed: int
) -> None:
    """Clustered codebooks, whose codewords bfloat16 alone cannot tell apart, at any scale and place."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, 24, generator=generator) + offset

    def draw(count: int) -> Tensor:
        chosen_centres = centres[torch.randint(clusters, (count,), generator=generator)]
        return 10**scale * (chosen_centres + 10**spread * torch.randn(count, 24, generator=generator))

    z, codebook = draw(200), draw(1100)
    codebook[7] = 1e4 * 10**scale  # a dead codeword, far from everything, must not spoil the bounds
    codes = nearest.nearest_by_search(z, codebook)
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 1100
    # fp32 resolves about 2^-22 of the products involved, the outlier's offset included.
    assert gap(z, codebook, codes) < 2**-18


def test_search__breaks_ties_by_the_smallest_index() -> None:
    codebook = vectors(700, 16, 2).repeat(2, 1)
    assert torch.equal(nearest.nearest_by_search(codebook, codebook), torch.arange(700).repeat(2))


def test_search__of_codewords_that_bfloat16_cannot_tell_apart_falls_back() -> None:
    codebook = 1 + 1e-4 * vectors(1200, 8, 0)
    codebook[0] = -1.0  # keeps the centre away from the crowd
    codebook[1] = 40.0
    z = codebook[2:300] + 1e-6
    assert torch.equal(nearest.nearest_by_search(z, codebook), torch.arange(2, 300))


def test_search__of_numbers_that_are_none_still_gives_codes() -> None:
    z = vectors(300, 8, 0)
    z[3], z[5] = float("nan"), float("inf")
    codebook = vectors(1100, 8, 1)
    codes = nearest.nearest_by_search(z, codebook)
    assert ((codes >= 0) & (codes < 1100)).all()
    fine = torch.ones(300, dtype=torch.bool)
    fine[[3, 5]] = False
    assert torch.equal(codes[fine], oracle(z[fine], codebook))


def test_search__never_holds_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "_SEARCH_ELEMENTS", 512 * 2048)
    with LargestTensor() as largest:
        nearest.nearest_by_search(vectors(8192, 4, 0), vectors(2048, 4, 1))
    assert largest.elements == 512 * 2048


def test_search__is_what_a_large_codebook_gets_on_a_cpu_with_fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    codebook_sizes: list[int] = []

    def search(z: Tensor, codebook: Tensor) -> Tensor:
        codebook_sizes.append(len(codebook))
        return torch.zeros(len(z), dtype=torch.int64)

    monkeypatch.setattr(nearest, "nearest_by_search", search)
    for supported in (False, True):
        monkeypatch.setattr(nearest, "cpu_prefers_bf16", lambda supported=supported: supported)
        for size in (64, 1024):
            nearest_codeword(vectors(3, 2, 0), vectors(size, 2, 1))
    assert codebook_sizes == [1024]


def test_nearest_codeword__is_one_operator_to_the_compiler() -> None:
    z, codebook = vectors(40, 8, 0), vectors(1100, 8, 1)
    graphs: list[Any] = []

    def capture_graph(module: Any, _inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    compiled = torch.compile(nearest_codeword, backend=capture_graph, fullgraph=True)
    assert torch.equal(compiled(z, codebook), oracle(z, codebook))
    (graph,) = graphs
    assert any("nearest_codeword" in str(node.target) for node in graph.graph.nodes)


def test_nearest_codeword__exports_for_any_number_of_vectors() -> None:
    class Search(torch.nn.Module):
        def forward(self, z: Tensor, codebook: Tensor) -> Tensor:
            return nearest_codeword(z, codebook)

    number = torch.export.Dim("number", min=2)
    example = (vectors(5, 4, 0), vectors(30, 4, 1))
    exported = torch.export.export(Search(), example, dynamic_shapes=({0: number}, None), strict=False)
    z = vectors(77, 4, 3)
    assert torch.equal(exported.module()(z, example[1]), oracle(z, example[1]))
