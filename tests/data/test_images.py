"""Behaviour that all forms of source share, and the errors for sources that cannot be opened."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pecobook.data.decode import BadImage
from pecobook.data.images import open_images
from pecobook.data.source import ImageSource, Splits
from pecobook.errors import DataError
from tests.data.sources import make_parquet, make_tar, names, samples, write


class CornerDataset(torch.utils.data.Dataset[Any]):
    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        return self.source.read(index)[:, :4, :4]


@pytest.fixture(params=["folder", "parquet", "shards", "photos"])
def any_source(request: pytest.FixtureRequest, tmp_path: Path, class_folder: Path) -> Splits:
    make: dict[str, Callable[[], str]] = {
        "folder": lambda: str(class_folder),
        "parquet": lambda: str(make_parquet(tmp_path)),
        "shards": lambda: str(make_tar(tmp_path / "x.tar", samples(range(12)))),
        "photos": lambda: "photos",
    }
    return open_images(make[request.param]())


def test_subset(any_source: Splits) -> None:
    source = any_source.train
    part = source.subset([5, 1, 1, 4])
    assert len(part) == 4
    assert names(part) == [source.identify(index) for index in (5, 1, 1, 4)]
    assert source.labels is not None
    assert part.labels is not None
    assert part.labels.tolist() == source.labels[[5, 1, 1, 4]].tolist()
    nested = part.subset(np.array([3, 0]))
    assert names(nested) == [source.identify(4), source.identify(5)]
    assert torch.equal(nested.read(1), source.read(5))
    assert len({source.fingerprint, part.fingerprint, nested.fingerprint}) == 3
    assert (part.name, part.split, part.classes) == (source.name, source.split, source.classes)
    assert len(source.subset([])) == 0
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source.subset([index])
        with pytest.raises(IndexError):
            source.read(index)


def test_pickling_and_workers(any_source: Splits) -> None:
    source = any_source.train
    expected = torch.stack([source.read(index)[:, :4, :4] for index in range(8)])  # opened before forking
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint == source.fingerprint
    assert torch.equal(copy.read(3), source.read(3))
    loader = DataLoader(CornerDataset(source.subset(range(8))), batch_size=2, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), expected)


def test_splits_share_nothing(any_source: Splits) -> None:
    assert not set(names(any_source.train)) & set(names(any_source.evaluation))
    assert len(any_source.evaluation) > 0
    assert any_source.train.fingerprint != any_source.evaluation.fingerprint


def test_fingerprint_changes_with_the_files(class_folder: Path, tmp_path: Path) -> None:
    before = open_images(str(class_folder)).train.fingerprint
    assert open_images(str(class_folder)).train.fingerprint == before
    write(class_folder / "cat" / "new.png")
    assert open_images(str(class_folder)).train.fingerprint != before
    moved = class_folder.rename(tmp_path / "moved")
    assert open_images(str(moved)).train.fingerprint != before
    (moved / "cat" / "new.png").unlink()
    assert open_images(str(moved)).train.fingerprint == before


def test_bad_images_name_the_file(class_folder: Path) -> None:
    train = open_images(str(class_folder)).train
    Path(train.identify(0)).write_bytes(b"")
    Path(train.identify(1)).unlink()
    with pytest.raises(BadImage) as caught:
        train.read(0)
    assert (caught.value.name, caught.value.reason) == (train.identify(0), "empty file")
    with pytest.raises(BadImage, match="No such file"):
        train.read(1)


# ---- sources that cannot be opened ----


def test_unknown_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "images" / "x.png")
    (tmp_path / "empty").mkdir()
    for name in ("a.txt", "a.tar.gz"):
        (tmp_path / name).touch()
    cases = {
        "photo": r"'photo' does not exist\. Did you mean 'photos'\?\nA source is a folder",
        "imagse": r"'imagse' does not exist\. Did you mean 'images'\?",
        str(tmp_path / "imagse" / "deeper"): rf"imagse' does not exist\. Did you mean '{tmp_path}/images'\?",
        "ftp://bucket/x": "A source is a folder of images, a parquet file or folder, tar shards",
        "nothing-*.tar": "no file matches this pattern",
        "empty": r"neither this folder nor its subfolders hold images.*jpg, jpeg, jpe.*npy.*; also parquet and tar",
        "images": "holds one image; at least two are needed",
        "images/x.png": "a single '.png' file is not a source; give the folder",
        "a.txt": "a single '.txt' file is not a source",
        "a.tar.gz": "'a.tar.gz' is compressed; unpack it",
        "": "A source is a folder",
        "~no-such-user/x": "cannot be opened",
        "x" * 5000: "cannot be opened|does not exist",
    }
    for source, message in cases.items():
        with pytest.raises(DataError, match=message) as caught:
            open_images(source)
        assert str(caught.value).count("\n") < 3


# ---- real data sets, if they are available ----


@pytest.mark.skipif("PECOBOOK_TEST_DATA" not in os.environ, reason="PECOBOOK_TEST_DATA names no folder")
@pytest.mark.parametrize(
    ("pack", "train", "evaluation", "classes"),
    [
        ("cifar10", 50_000, 10_000, 10),
        ("tiny-imagenet-a", 38_000, 5_000, 100),
        ("imagenet-sample", 900, 100, 1000),
    ],
)
def test_data_packs(pack: str, train: int, evaluation: int, classes: int) -> None:
    splits = open_images(str(Path(os.environ["PECOBOOK_TEST_DATA"]) / pack))
    assert (len(splits.train), len(splits.evaluation)) == (train, evaluation)
    assert splits.train.classes is not None
    assert len(splits.train.classes) == classes
    for index in range(0, evaluation, evaluation // 50):
        assert splits.evaluation.read(index).shape[0] == 3
