"""Pictures of an analysis: columns, neighbours and maps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from pecobook.analysis.atlas import Atlas
from pecobook.analysis.codewords import GalleryRow, code_usage
from pecobook.analysis.occurrences import class_shares
from pecobook.commands.analyze.pictures import galleries, pictures_of
from tests.commands.test_analyze import run


def test_analyze__a_run_called_original_has_a_separate_column(
    images: Path, codebook_run: Path, vit_run: Path, tmp_path: Path
) -> None:
    names = {"original": codebook_run, "_a$^$": codebook_run}
    for name, folder in names.items():
        (tmp_path / name).symlink_to(folder)
    (tmp_path / "vits").mkdir()
    (tmp_path / "vits" / "masked").symlink_to(vit_run)
    first, second = (str(tmp_path / name) for name in names)
    out = tmp_path / "out"
    vit = str(tmp_path / "vits" / "masked")
    results, _ = run(out, tokenizer=first, against=(second,), backbone=(vit,), data=str(images))
    rows = min(6, results["tokenizers"][0]["num_images"])
    for picture in ("reconstructions.png", "masked-38.png"):
        width, height = Image.open(out / "pictures" / picture).size
        assert rows < 3 * height / width < 1.25 * rows  # three columns of square pictures with titles


def pictures(labels: Tensor | None = None, classes: tuple[str, ...] = ()) -> tuple[dict[str, bytes], Atlas]:
    """Draw the pictures of 100 codewords on a line, of which the first and the last are in use."""
    codes = torch.zeros(8, 2, 2, dtype=torch.long)
    codes[0, 0, 0] = 99
    tokenizer = SimpleNamespace(codebook=torch.linspace(0, 1, 100)[:, None].repeat(1, 2), num_codewords=100)
    usage = code_usage(codes, 100)
    return pictures_of(tokenizer, torch.rand(8, 3, 8, 8), codes, labels, usage, classes=classes, requested=(), seed=0)


def test_pictures_of__finds_used_neighbours_among_all_codewords(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[tuple[int, int, int, list[tuple[int, int, int]]]]] = []

    def record(rows: list[GalleryRow], _: object = None) -> bytes:
        drawn.append(
            [(row.codeword, row.count, row.images, [(p.image, p.row, p.column) for p in row.patches]) for row in rows]
        )
        return b""

    monkeypatch.setattr("pecobook.analysis.figures.gallery_picture", record)
    assert set(pictures()[0]) == {"gallery", "gallery-ranked", "positions", "neighbours", "atlas"}
    first, _, neighbours = drawn
    assert {row[:3] for row in first} == {(0, 31, 8), (99, 1, 1)}
    assert [row[:3] for row in neighbours] == [
        (0, 31, 8),
        (99, 1, 1),
    ]  # the most used and its used neighbour
    assert neighbours[1][3] == [(0, 0, 0)]
    assert len(neighbours[0][3]) == 6
    assert len({image for image, _, _ in neighbours[0][3]}) == 6
    assert (0, 0, 0) not in neighbours[0][3]


def test_pictures_of__the_atlas_knows_classes_and_unused_codewords() -> None:
    _, atlas = pictures(torch.full((8,), 2), ("blue", "green", "red"))
    assert (sorted(atlas.codewords.tolist()), atlas.num_codewords) == ([0, 99], 100)
    assert atlas.classes == (None, None)  # all images have one class, so no codeword tells more about it than another


def test_galleries__rank_by_class_lift_or_else_by_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codeword 5 is in all images of "red" alone; codeword 0 fills all other places."""
    drawn: list[list[int]] = []

    def record(rows: list[GalleryRow], _: object = None) -> bytes:
        drawn.append([row.codeword for row in rows])
        return b""

    monkeypatch.setattr("pecobook.analysis.figures.gallery_picture", record)
    codes = torch.zeros(40, 2, 2, dtype=torch.long)
    codes[:10, 0, 0] = 5
    labels = torch.tensor([1] * 10 + [0] * 30)
    usage = code_usage(codes, 10)
    shares = class_shares(codes, labels, 10, ["blue", "red"])
    galleries(torch.rand(40, 3, 8, 8), codes, usage, shares, seed=0)
    galleries(torch.rand(40, 3, 8, 8), codes, usage, None, requested=(7,), seed=0)
    (_, by_lift, requested, by_use) = drawn
    assert by_lift == [5]
    assert requested[0] == 7
    assert by_use == [0, 5]
