"""Codeword measures against scikit-learn, closed forms and direct counting."""

from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch

from pecobook.analysis.codewords import (
    bag_of_codes,
    code_gallery,
    code_usage,
    distinct_codewords,
    mean_codewords,
)


def some_codes(number: int = 6, side: int = 4, k: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, k, (number, side, side), generator=torch.Generator().manual_seed(seed))


def test_usage_of_even_codes_is_their_number() -> None:
    usage = code_usage(torch.tensor([[0, 1], [2, 3]]), 10)
    assert usage.codes_used == 4
    assert usage.perplexity == pytest.approx(4)
    assert usage.counts.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]


def test_usage_of_uneven_codes() -> None:
    usage = code_usage(np.array([0, 0, 0, 7]), 8)
    assert usage.perplexity == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))
    assert usage.codes_used == 2


@pytest.mark.parametrize("codes", [[], [8], [-1]])
def test_usage_refuses_impossible_codes(codes: list[int]) -> None:
    with pytest.raises(ValueError):
        code_usage(np.array(codes, dtype=np.int64), 8)


def test_distinct_codewords_equal_perplexity_if_no_codewords_are_similar() -> None:
    generator = torch.Generator().manual_seed(0)
    codebook, counts = torch.randn(40, 6, generator=generator), torch.randint(0, 9, (40,), generator=generator)
    codes = torch.arange(40).repeat_interleave(counts)
    assert distinct_codewords(codebook, counts.float()) == pytest.approx(code_usage(codes, 40).perplexity, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("number", [1, 3])
def test_distinct_codewords_count_copies_once(number: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(number, 6, generator=generator)
    codebook = points.repeat(20, 1) + 1e-3 * torch.randn(20 * number, 6, generator=generator)
    assert distinct_codewords(scale * codebook, torch.full((20 * number,), 0.3)) == pytest.approx(number, rel=1e-5)


def test_distinct_codewords_by_hand() -> None:
    """On a line: the second codeword is similar to the first and the third, which differ; the fourth is unused."""
    codebook, usage = torch.tensor([[10.0], [10.15], [10.3], [20.0]]), torch.tensor([1.0, 1.0, 2.0, 0.0])
    expected = np.exp(-(0.25 * np.log(0.5) + 0.25 * np.log(1.0) + 0.5 * np.log(0.75)))
    assert distinct_codewords(codebook, usage) == pytest.approx(expected, rel=1e-5)
    assert distinct_codewords(codebook, torch.zeros(4)) == 1.0


def test_mean_codewords_equals_a_loop() -> None:
    codes, codebook = some_codes(), torch.randn(5, 3)
    expected = torch.stack([torch.stack([codebook[int(c)] for c in image.flatten()]).mean(0) for image in codes])
    torch.testing.assert_close(mean_codewords(codes, codebook), expected)


def test_bag_of_codes_is_a_unit_vector_of_rooted_shares() -> None:
    codes = some_codes()
    bag = bag_of_codes(codes.numpy(), 5)
    torch.testing.assert_close(bag.norm(dim=1), torch.ones(6))
    assert float(bag[2, 3] ** 2) == pytest.approx(float((codes[2] == 3).float().mean()))


def test_features_of_codes_are_in_memory_once() -> None:
    """Those of a million images are the largest tensors of `analyze` and `probe`."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
        sizes: ClassVar[list[int]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            inside = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in inside:
                self.sizes.append(out.untyped_storage().nbytes())
            return out

    codes, codebook = torch.randint(40, (2**17, 2, 1)), torch.randn(40, 30)
    for features in (partial(mean_codewords, codes, codebook), partial(bag_of_codes, codes, 40)):
        Made.sizes = []
        with Made():  # type: ignore[no-untyped-call]
            whole = features().nbytes
        assert max(Made.sizes) == whole
        assert sum(size > whole / 2 for size in Made.sizes) == 1


def test_gallery_holds_only_patches_with_the_codeword() -> None:
    codes = some_codes(8, 4, 5)
    # Every pixel encodes the code of its patch, so a crop shows its code.
    images = (codes / 10).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand(-1, 3, -1, -1)
    gallery = code_gallery(images, codes, codewords=4, patches=6, seed=3)
    assert len(gallery) == 4
    for row in gallery:
        assert row.count == int((codes == row.codeword).sum())
        assert row.images == int((codes == row.codeword).flatten(1).any(1).sum())
        assert row.positions.tolist() == [
            [sum(int(codes[n, y, x]) == row.codeword for n in range(8)) for x in range(4)] for y in range(4)
        ]
        for patch in row.patches:
            assert int(codes[patch.image, patch.row, patch.column]) == row.codeword
            top, left, height, width = (round(value) for value in patch.box)
            assert (height, width) == (8, 8)
            assert patch.window.shape == (3, 24, 24)
            inside = patch.window[:, top : top + 8, left : left + 8]
            torch.testing.assert_close(inside, torch.full_like(inside, row.codeword / 10))


def test_gallery_takes_the_most_used_codewords_after_the_chosen_ones() -> None:
    codes = torch.tensor([[[0, 0], [0, 1]], [[0, 2], [2, 1]]])
    images = torch.rand(2, 3, 8, 8)
    assert [row.codeword for row in code_gallery(images, codes, codewords=2)] == [0, 1]
    gallery = code_gallery(images, codes, codewords=3, chosen=[9, 2])
    assert [row.codeword for row in gallery] == [9, 2, 0]
    assert gallery[0].patches == ()
    assert gallery[0].count == 0
    assert gallery[2].positions.tolist() == [[2, 1], [1, 0]]


def test_gallery_shows_every_image_once_before_any_image_twice() -> None:
    codes = torch.zeros(5, 4, 4, dtype=torch.long)
    row = code_gallery(torch.rand(5, 3, 16, 16), codes, codewords=1, patches=10)[0]
    assert sorted(patch.image for patch in row.patches[:5]) == [0, 1, 2, 3, 4]
    assert sorted(patch.image for patch in row.patches[5:]) == [0, 1, 2, 3, 4]
    assert len({(patch.image, patch.row, patch.column) for patch in row.patches}) == 10


def test_gallery_is_deterministic_and_rows_do_not_depend_on_each_other() -> None:
    codes, images = some_codes(8, 4, 5), torch.rand(8, 3, 16, 16)

    def places(seed: int, number: int) -> list[list[tuple[int, int, int]]]:
        gallery = code_gallery(images, codes, codewords=number, seed=seed)
        return [[(p.image, p.row, p.column) for p in row.patches] for row in gallery]

    assert places(1, 5) == places(1, 5)
    assert places(1, 5)[:2] == places(1, 2)
    assert places(1, 5) != places(2, 5)


def test_gallery_of_tiny_images_uses_the_whole_image() -> None:
    row = code_gallery(torch.rand(1, 3, 4, 4), torch.zeros(1, 1, 1, dtype=torch.long), codewords=1)[0]
    assert row.patches[0].window.shape == (3, 4, 4)
    assert row.patches[0].box == (0, 0, 4, 4)
