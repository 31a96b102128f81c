"""Stability, two-alternative judgements and the map of the codebook."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pecobook.analysis.codebook_map import grid_cells, nearest_used, project_to_plane
from pecobook.analysis.similarity import (
    agreement,
    code_distance,
    find_bapps,
    pixel_distance,
    read_bapps,
    shifted_and_blurred,
    shifted_preferred,
)
from pecobook.analysis.stability import blur, changes, jitter, jpeg, shift, stability
from pecobook.errors import DataError
from tests.analysis.fakes import GreyTokenizer


def pictures(count: int = 4, side: int = 16) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_stability__is_100_for_changes_that_keep_the_codes() -> None:
    tokenizer, images = GreyTokenizer(), pictures()
    found = stability(tokenizer, images, tokenizer.encode(images), 4)
    assert set(found) == set(changes(4))
    assert found["none"] == 100
    assert found["flip"] == 100  # the mean of a patch does not change when the patch is flipped
    assert 0 <= found["blur, sigma 1"] < 100
    flat = torch.full((2, 3, 16, 16), 0.5)
    assert stability(tokenizer, flat, tokenizer.encode(flat), 4)["shift by 1 pixel"] == 100


def test_changes_by_hand() -> None:
    images = pictures()
    moved = shift(images, 3)
    assert torch.equal(moved[..., 3:, 3:], images[..., :-3, :-3])
    assert torch.equal(moved[..., 0, 3:], images[..., 0, :-3])
    assert blur(images, 2.0).var() < 0.2 * images.var()
    grey = images[:, :1].expand(-1, 3, -1, -1)  # JPEG halves the resolution of colour
    assert float((jpeg(grey, 95) - grey).abs().mean()) < 0.03
    assert jpeg(images).shape == images.shape
    torch.testing.assert_close(jitter(torch.full((1, 3, 4, 4), 0.4), 0.2), torch.full((1, 3, 4, 4), 0.48))


def test_shifted_preferred__counts_images_whose_shifted_copy_is_nearer() -> None:
    images = pictures(6, 56)
    shifted, blurred = shifted_and_blurred(images)
    assert torch.equal(shifted, shift(images, 1))
    expected = ((images - shifted).flatten(1).norm(dim=1) < (images - blurred).flatten(1).norm(dim=1)).float()
    assert shifted_preferred(images, pixel_distance) == pytest.approx(100 * float(expected.mean()))
    assert shifted_preferred(images, lambda _, y: (y - blurred).flatten(1).norm(dim=1)) == 0
    assert shifted_preferred(images, lambda _, y: (y - shifted).flatten(1).norm(dim=1)) == 100
    assert shifted_preferred(images, lambda x, _: x.flatten(1).norm(dim=1)) == 50


def test_code_distance_is_the_mean_distance_of_codewords() -> None:
    tokenizer, x, y = GreyTokenizer(), pictures(3), 1 - pictures(3)
    found = code_distance(tokenizer)(x, y)
    first, second = tokenizer.encode(x), tokenizer.encode(y)
    for image in range(3):
        total = [
            float((tokenizer.codebook[first[image, r, c]] - tokenizer.codebook[second[image, r, c]]).norm())
            for r in range(4)
            for c in range(4)
        ]
        assert float(found[image]) == pytest.approx(sum(total) / 16, rel=1e-5)
    assert code_distance(tokenizer)(x, x).tolist() == [0, 0, 0]


def write_triplets(folder: Path) -> None:
    """Write two triplets: all people prefer the second image of the first, a quarter the second image of the other."""
    for part, levels in {"ref": (100, 100), "p0": (200, 90), "p1": (101, 200)}.items():
        (folder / part).mkdir(parents=True)
        for number, level in enumerate(levels):
            Image.fromarray(np.full((12, 16, 3), level, dtype=np.uint8)).save(folder / part / f"{number:06d}.png")
    (folder / "judge").mkdir()
    for number, share in enumerate((1.0, 0.25)):
        np.save(folder / "judge" / f"{number:06d}.npy", np.array([share], dtype=np.float32))


def test_agreement__is_the_share_of_people(tmp_path: Path) -> None:
    write_triplets(tmp_path / "val" / "cnn")
    triplets = read_bapps(find_bapps(tmp_path), 8)
    assert triplets.reference.shape == (2, 3, 8, 8)
    assert triplets.prefer_second.tolist() == [1.0, 0.25]
    # Pixels choose the second, then the first: all people agree, then three quarters.
    assert agreement(triplets, pixel_distance) == pytest.approx(100 * (1.0 + 0.75) / 2)
    assert agreement(triplets, lambda x, y: -pixel_distance(x, y)) == pytest.approx(100 * (0.0 + 0.25) / 2)
    # Equal distances agree with half of the people, as LPIPS counts them.
    assert agreement(triplets, lambda x, y: 0 * pixel_distance(x, y)) == 50


def test_find_bapps__reads_every_folder_and_names_a_bad_file(tmp_path: Path) -> None:
    for part in ("cnn", "traditional"):
        write_triplets(tmp_path / part)
    found = find_bapps(tmp_path, limit=2)
    assert [file.relative_to(tmp_path).parts[0] for file in found] == ["cnn", "traditional"]
    assert list(found.values()) == [1.0, 0.25]
    for content in (b"", b"no numbers"):
        (tmp_path / "cnn" / "judge" / "000001.npy").write_bytes(content)
        with pytest.raises(DataError, match=r"cnn/judge/000001\.npy' of the judgements cannot be read"):
            find_bapps(tmp_path)


def test_bapps__refuses_other_layouts_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not in the layout of BAPPS"):
        find_bapps(tmp_path)
    write_triplets(tmp_path)
    found = find_bapps(tmp_path)
    (tmp_path / "p1" / "000001.png").unlink()
    with pytest.raises(DataError, match=r"p1/000001\.png' of the judgements cannot be read"):
        find_bapps(tmp_path)
    with pytest.raises(DataError, match=r"p1/000001\.png' of the judgements cannot be read"):
        read_bapps(found, 8)


def test_nearest_used__are_the_nearest_other_codewords_in_use() -> None:
    book = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [10.0, 0.0]])
    assert nearest_used(book, 0, np.ones(4, dtype=np.int64)) == [1, 2, 3]
    assert nearest_used(book, 3, np.array([1, 1, 0, 0])) == [1, 0]
    assert nearest_used(torch.arange(9.0)[:, None], 8, np.ones(9, dtype=np.int64)) == [7, 6, 5, 4]
    assert nearest_used(book, 2, np.array([0, 0, 5, 0])) == []


def test_project_to_plane__keeps_clusters_together() -> None:
    generator = torch.Generator().manual_seed(0)
    book = torch.cat([torch.randn(30, 8, generator=generator) + 40 * k for k in range(2)])
    plane = project_to_plane(book)
    assert plane.shape == (60, 2)
    first, second = plane[:30].mean(0), plane[30:].mean(0)
    assert np.linalg.norm(first - second) > 2 * np.linalg.norm(plane[:30] - first, axis=1).mean()
    assert np.array_equal(project_to_plane(book), plane)
    assert project_to_plane(torch.randn(3, 1)).shape == (3, 2)


def test_grid_cells__keep_neighbours_and_use_each_cell_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shuffled grid is put in order again; a plane of two clusters becomes two halves."""
    monkeypatch.setattr("pecobook.analysis.codebook_map._MATCHED", 64)
    cells = np.stack(np.divmod(np.arange(256), 16), 1)
    order = np.random.default_rng(0).permutation(256)
    plane = cells[:, ::-1].astype(np.float32)
    assert np.array_equal(grid_cells(plane[order]), cells[order])
    clusters = np.random.default_rng(1).normal(size=(190, 2)).astype(np.float32) + np.repeat([[0, 0], [50, 0]], 95, 0)
    found = grid_cells(clusters.astype(np.float32))
    assert len(np.unique(found, axis=0)) == 190
    assert found.max(0).tolist() == [13, 13]  # 190 codewords need 14 rows of 14, and leave the end of the last one free
    assert found[:95, 1].max() <= found[95:, 1].min() + 1
    assert grid_cells(np.zeros((1, 2), np.float32)).tolist() == [[0, 0]]
