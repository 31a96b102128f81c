"""Layouts of images and masks that tools write, and what is said where no pair can be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pecobook.data.dense.segmentation import open_segmentation
from pecobook.data.dense.segmentation_check import verify
from pecobook.errors import DataError


def save(path: Path, height: int, width: int, values: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.indices((height, width)).sum(0) % values).astype(np.uint8)).save(path)


def test_open__the_folders_of_fiftyone(tmp_path: Path) -> None:
    for folder in ("train", "validation"):
        for number in range(3):
            save(tmp_path / folder / "data" / f"{number}.png", 4, 6, 200)
            save(tmp_path / folder / "labels" / f"{number}.png", 4, 6, 2)
    splits = open_segmentation(str(tmp_path))
    assert (len(splits.train), len(splits.evaluation), splits.evaluation_name) == (3, 3, "validation")
    assert splits.train.identify(1) == "train/data/1.png"


def test_open__does_not_count_files_that_are_not_there(tmp_path: Path) -> None:
    save(tmp_path / "images" / "1.png", 4, 6, 200)
    (tmp_path / "instances.json").touch()
    with pytest.raises(DataError, match=r"holds no masks: [^:]*\.$"):
        open_segmentation(str(tmp_path))


def test_verify__masks_of_which_none_fits(tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path / "images" / f"{number}.png", 4, 6, 200)
        save(tmp_path / "masks" / f"{number}.png", 6, 4, 2)
    with pytest.raises(DataError, match=r"none of 3 training masks can be used; the first is 4 x 6, but its image is"):
        verify(open_segmentation(str(tmp_path)))
