"""Large codebooks: updates in tiles, starts from bounded samples, revival without copies, unit length."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from pecobook.analysis.codewords import distinct_codewords
from pecobook.models import nearest, quantizer
from pecobook.models.nearest import nearest_by_chunks
from pecobook.models.quantizer import VectorQuantizer
from tests.distributed import TwoProcesses
from tests.models.quantizing import State, assert_same, latents, rows, state_of


def trained(**settings: Any) -> VectorQuantizer:
    module = VectorQuantizer(num_codewords=50, dim=6, revive_after=6, **settings)
    for seed in range(25):
        for micro in (0, 1):
            module(latents(2, 6, 3, 2 * seed + micro))
        module.update()
    return module


@pytest.mark.parametrize("settings", [{}, {"normalise": True}, {"kind": "gradient"}])
@pytest.mark.parametrize("tile", [1, 42, 6 * 49])
def test_update__does_not_depend_on_the_tiles(
    tile: int, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = state_of(trained(**settings))
    monkeypatch.setattr(quantizer, "_TILE", tile)
    assert_same(state_of(trained(**settings)), whole)


def test_update__needs_no_further_copy_of_the_codebook() -> None:
    """The largest tensor that an update makes has the size of a tile."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            inside = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in inside:
                self.size = max(self.size, out.numel())
            return out

    module = VectorQuantizer(num_codewords=2**17, dim=128)
    module._initialised = True
    module(latents(1, 128, 4, 0))
    with Largest() as largest:  # type: ignore[no-untyped-call]
        module.update()
    assert largest.size <= quantizer._TILE < module.codebook.numel() / 2


def test_revival__gives_each_vector_to_one_codeword() -> None:
    module = VectorQuantizer(num_codewords=64, dim=4, revive_after=5)
    for seed in range(40):
        module(latents(1, 4, 4, seed))  # 16 vectors for 64 codewords
        module.update()
    assert len(torch.unique(module.codebook, dim=0)) == 64
    assert float(torch.cdist(module.codebook, module.codebook).fill_diagonal_(1).min()) > 1e-3
    assert int(module.num_revived) > 32


def test_large_codebook__comes_to_life() -> None:
    """Of 2,048 codewords, 4,096 new vectors use two thirds after 120 steps of 64 vectors.

    Where a vector revived many codewords, 816 codewords differed, and 796 were used.
    """
    module = VectorQuantizer(num_codewords=2048, dim=8, revive_after=40)
    for seed in range(120):
        module(latents(1, 8, 8, seed))
        module.update()
    assert len(torch.unique(module.codebook, dim=0)) == 2048
    assert len(torch.unique(module.eval()(latents(64, 8, 8, 1000)).codes)) > 1100


def test_start__reads_a_bounded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = quantizer.kmeans

    def counted(vectors: Tensor, num_clusters: int, *, seed: int) -> tuple[Tensor, Tensor]:
        sizes.append(len(vectors))
        return real(vectors, num_clusters, seed=seed)

    monkeypatch.setattr(quantizer, "kmeans", counted)
    monkeypatch.setattr(quantizer, "_START_VECTORS", 300)
    module = VectorQuantizer(num_codewords=50, dim=4)
    module.start(latents(16, 4, 10, 0))  # 1,600 vectors: 32 x 50, above 300
    assert 300 <= sizes[0] < 600
    assert float(module.ema_count.sum()) == pytest.approx(1600)
    monkeypatch.setattr(quantizer, "_START_VECTORS", 2**18)
    VectorQuantizer(num_codewords=50, dim=4).start(latents(16, 4, 10, 0))
    assert sizes[1] == 1600


def run_rank(rank: int, world_size: int) -> State:
    with pytest.MonkeyPatch.context() as patch:  # the processes go on with other tests
        patch.setattr(quantizer, "_TILE", 40)
        patch.setattr(quantizer, "_START_VECTORS", 128)
        module = VectorQuantizer(num_codewords=100, dim=4, revive_after=4)
        for seed in range(41):
            z = latents(4, 4, 4, seed)
            share = len(z) // world_size
            module(z[rank * share : (rank + 1) * share])
            module.update()
        return state_of(module)


def test_two_processes__keep_equal_codebooks_in_tiles(two_processes: TwoProcesses) -> None:
    state = run_rank(0, 1)
    left, right = two_processes.run(run_rank)
    assert_same(left, right)
    assert int(state["num_revived"]) == int(left["num_revived"]) > 30
    assert_close(left["codebook"], state["codebook"], atol=1e-5, rtol=1e-5)


def test_normalised__a_codebook_that_learns_by_gradient_returns_to_unit_length() -> None:
    module = trained(normalise=True, kind="gradient")
    with torch.no_grad():
        module.codebook.mul_(3)  # as an optimizer's step
    module(latents(2, 6, 3, 0))
    module.update()
    assert_close(module.codebook.norm(dim=1), torch.ones(50))


def test_normalised__codewords_and_vectors_have_unit_length_and_the_loss_is_one_of_angles() -> None:
    module = trained(normalise=True)
    assert_close(module.codebook.norm(dim=1), torch.ones(50))
    z = (7 * latents(2, 6, 3, 99)).requires_grad_()
    out = module.eval()(z)
    unit = rows(z) / rows(z).norm(dim=1, keepdim=True)
    cosine = unit @ module.codebook.T
    assert torch.equal(out.codes.flatten(), cosine.argmax(1))
    expected = ((2 - 2 * cosine.max(1).values) / 6).mean()  # |a - b|^2 = 2 - 2 cos
    assert_close(out.commitment_loss, expected)
    assert torch.equal(module(z * 3).codes, out.codes)
    (gradient,) = torch.autograd.grad(out.commitment_loss, z)
    assert_close((gradient * z).sum(1), torch.zeros(2, 3, 3), atol=1e-6, rtol=0)  # none along the vector


def test_search__of_a_large_codebook_holds_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_at_once = []
    real = nearest._scores

    def counted(z: Tensor, codebook: Tensor, half_norms: Tensor) -> Tensor:
        rows_at_once.append(len(z))
        return real(z, codebook, half_norms)

    monkeypatch.setattr(nearest, "_scores", counted)
    generator = torch.Generator().manual_seed(0)
    codebook, z = (torch.randn(n, 4, generator=generator) for n in (2**18, 300))
    codes = nearest_by_chunks(z, codebook)
    assert max(rows_at_once) == 128
    assert torch.equal(codes[:5], torch.cdist(z[:5].double(), codebook.double()).argmin(1))


def test_distinct_codewords__of_a_large_codebook_is_estimated_from_a_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    few = F.normalize(torch.randn(300, 8, generator=generator), dim=1)
    copies = few.repeat(100, 1)  # 30,000 codewords, of which 300 differ
    usage = torch.rand(len(copies), generator=generator)
    share = (usage.view(100, 300).sum(0) / usage.sum()).double()
    exact = math.exp(-float((share * share.log()).sum()))
    assert distinct_codewords(copies, usage) == pytest.approx(exact, rel=0.02)
