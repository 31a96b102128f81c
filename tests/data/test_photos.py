"""The built-in photographs."""

from __future__ import annotations

import pytest
import torch

from pecobook.data import photos
from pecobook.data.images import open_images
from pecobook.errors import DataError


def test_photos() -> None:
    splits = open_images("photos")
    train, evaluation = splits.train, splits.evaluation
    assert splits.evaluation_name == "held-out regions"
    assert train.name == "photos"
    assert train.classes == evaluation.classes
    assert train.classes is not None
    assert train.labels is not None
    assert evaluation.labels is not None
    for source in (train.labels, evaluation.labels):
        assert set(source.tolist()) == set(range(len(train.classes)))
    assert len(train) + len(evaluation) > 1500
    assert 0.2 < len(evaluation) / (len(train) + len(evaluation)) < 0.3
    assert train.read(0).shape == (3, photos.TILE, photos.TILE)
    assert train.identify(0) == "astronaut tile 0"


def test_photo_tiles_are_regions_of_the_photographs() -> None:
    from skimage.data import astronaut

    photograph = torch.from_numpy(astronaut()).permute(2, 0, 1)
    splits = open_images("photos")
    is_held_out = {}
    for source in (splits.train, splits.evaluation):
        for index in range(120):
            name, _, tile = source.identify(index).split(" ")
            if name == "astronaut":
                row, column = divmod(int(tile), 10)
                is_held_out[row, column] = source is splits.evaluation
                top, left = row * 48, column * 48
                assert torch.equal(source.read(index), photograph[:, top : top + 48, left : left + 48])
    assert len(is_held_out) == 100
    for (row, column), value in is_held_out.items():  # a block of 2 x 2 tiles is held out as one
        assert is_held_out[row // 2 * 2, column // 2 * 2] == value


def test_large_photos_are_reduced() -> None:
    assert photos.load_photo("retina").shape == (3, 512, 512)
    assert photos.load_photo("rocket").shape == (3, 427, 640)


def test_a_missing_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(photos.PHOTOS, "moon", ("skimage", "data/green_cheese.png"))
    with pytest.raises(DataError, match="the installed scikit-image lacks the photograph 'moon'"):
        open_images("photos")
