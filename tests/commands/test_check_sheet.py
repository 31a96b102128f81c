"""`pecobook check`: the contact sheet, and what a source without a command is read as."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pecobook.commands.check import layout_of
from pecobook.commands.check.sheet import chosen_images
from pecobook.data.images import open_images
from tests.coco import make_coco
from tests.commands.test_check import run, write
from tests.runs import squares
from tests.shapes import write_shapes


@pytest.mark.parametrize("kind", ["images", "segment", "detect"])
def test_check__draws_a_contact_sheet(
    kind: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make = {
        "images": lambda: images,
        "segment": lambda: write_shapes(tmp_path / "a"),
        "detect": lambda: make_coco(tmp_path),
    }
    data, file = make[kind](), tmp_path / "sheet.png"
    _, out = run(["--data", str(data), "--out", str(file), "--samples", "6"], capsys)
    assert f"contact sheet: {file}" in out
    sheet = np.array(Image.open(io.BytesIO(file.read_bytes())))
    assert sheet.shape == (2 * 244, 3 * 228, 3)  # two rows of three cells with captions
    cells = sheet.reshape(2, 244, 3, 228, 3).transpose(0, 2, 1, 3, 4)[..., 2:226, 2:226, :]
    assert all(len(np.unique(cell.reshape(-1, 3), axis=0)) > 50 for row in cells for cell in row)
    if kind == "images":  # two of each class, of which each has its own colour
        means = cells.mean((2, 3))
        assert means.argmax(-1).tolist() == [[2, 2, 1], [1, 0, 0]]


def test_chosen_images__takes_each_class_in_turn() -> None:
    source = squares(10)
    assert source.labels is not None
    source.labels = np.array([0, 0, 0, 0, 0, 0, 0, 1, 2, 2])
    source.classes = ("a", "b", "c")
    assert chosen_images(source, 6) == [0, 1, 2, 7, 8, 9]
    source.labels = None
    assert chosen_images(source, 4) == [0, 2, 5, 7]
    assert chosen_images(source, 99) == list(range(10))


def test_layout_of__tells_objects_masks_and_images_apart(images: Path, tmp_path: Path) -> None:
    assert layout_of(str(images)) == layout_of("photos") == layout_of("hf:a/b") == "images"
    assert layout_of(str(write_shapes(tmp_path / "a"))) == "segment"
    assert layout_of(str(make_coco(tmp_path / "b"))) == "detect"
    write(tmp_path / "c" / "images" / "1.png", 1)  # images/ beside other class folders
    write(tmp_path / "c" / "pictures" / "1.png", 1)
    assert layout_of(str(tmp_path / "c")) == "images"
    assert open_images(str(tmp_path / "c")).train.classes == ("images", "pictures")


def test_layout_of__photographs_of_masks(tmp_path: Path) -> None:
    for number in range(4):
        for name in ("mask", "no_mask"):
            write(tmp_path / name / f"{number}.jpg", number, mode="RGB")
    assert layout_of(str(tmp_path)) == "images"
    for file in tmp_path.glob("mask/*.jpg"):
        write(file.with_suffix(".png"), 1)
        file.unlink()
    assert layout_of(str(tmp_path)) == "segment"
