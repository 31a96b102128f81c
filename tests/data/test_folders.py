"""Folders of images: classes, splits, order, and the images held out if no folder declares an evaluation split."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pecobook.data.images import open_images
from pecobook.errors import DataError
from tests.data.sources import labels, names, png, values, write


def test_class_folder(class_folder: Path) -> None:
    splits = open_images(str(class_folder))
    assert splits.evaluation_name == "held-out 10% of train"
    assert (len(splits.train), len(splits.evaluation)) == (18, 2)
    assert splits.train.classes == splits.evaluation.classes == ("cat", "dog")
    assert (splits.train.split, splits.evaluation.split) == ("train", "evaluation")
    assert splits.train.name == str(class_folder)
    for source in (splits.train, splits.evaluation):
        assert labels(source) == [Path(name).parts[-3] for name in names(source)]
        assert values(source) == [int(Path(name).stem) for name in names(source)]
        assert all(Path(name).is_file() for name in names(source))
    assert splits.train.read(0).shape == (3, 4, 6)


def test_a_flat_folder_or_a_single_folder_gives_no_labels(tmp_path: Path, class_folder: Path) -> None:
    for number in range(3):
        write(tmp_path / "one" / "images" / f"{number}.png")
    write(class_folder / "loose.png")
    for folder in (tmp_path / "one", class_folder):
        train = open_images(str(folder)).train
        assert train.labels is None
        assert train.classes is None


def test_extensions_hidden_files_and_links(tmp_path: Path) -> None:
    for name in ("a.JPG", "b.jpeg", "c.PnG", "d.bmp", "e.gif", "f.tif", "g.tiff", "h.webp", "i.ppm", "j.pgm"):
        write(tmp_path / "x" / name)
    for name in ("._a.jpg", ".hidden/k.png", "notes.txt", "png", "l.png.part"):
        write(tmp_path / "x" / name)
    (tmp_path / "x" / "loop").symlink_to(tmp_path / "x")
    (tmp_path / "x" / "k.png").symlink_to(tmp_path / "x" / "a.JPG")
    splits = open_images(str(tmp_path / "x"))
    read_names = sorted(Path(name).name for name in names(splits.train) + names(splits.evaluation))
    assert [name[0] for name in read_names] == list("abcdefghijk")


@pytest.mark.parametrize(
    ("folders", "evaluation_name"),
    [
        (("train", "val"), "validation"),
        (("train", "validation"), "validation"),
        (("train", "test"), "test"),
        (("train", "val", "test"), "test"),
        (("Train", "TEST"), "test"),
    ],
)
def test_split_folders(tmp_path: Path, folders: tuple[str, ...], evaluation_name: str) -> None:
    for number, folder in enumerate(folders):
        for name in ("cat", "dog"):
            write(tmp_path / folder / name / "x.png", number)
    write(tmp_path / "extra" / "y.png", 99)
    splits = open_images(str(tmp_path))
    assert splits.evaluation_name == evaluation_name
    assert values(splits.train) == [0, 0]
    assert values(splits.evaluation) == [len(folders) - 1] * 2
    assert labels(splits.train) == labels(splits.evaluation) == ["cat", "dog"]


def test_a_validation_class_that_training_lacks(tmp_path: Path) -> None:
    for name in ("train/cat", "train/dog", "val/cat", "val/dogs"):
        write(tmp_path / name / "x.png")
    with pytest.raises(DataError, match=r"class 'dogs' of validation is missing in train\. Did you mean 'dog'"):
        open_images(str(tmp_path))


def test_classes_are_those_of_training(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "train/c", "test/c"):
        write(tmp_path / name / "x.png")
    splits = open_images(str(tmp_path))
    assert splits.evaluation.classes == ("a", "b", "c")
    assert labels(splits.evaluation) == ["c"]


def test_labelled_validation_is_preferred_to_unlabelled_test(tmp_path: Path) -> None:
    for name in ("train/a/x", "train/b/x", "val/a/x", "test/x"):
        write(tmp_path / f"{name}.png")
    splits = open_images(str(tmp_path))
    assert splits.evaluation_name == "validation"
    assert labels(splits.evaluation) == ["a"]


def test_a_single_folder_train(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / "train" / "ab"[number % 2] / f"{number}.png")
    assert open_images(str(tmp_path)).train.classes == ("a", "b")
    write(tmp_path / "car" / "x.png")  # now "train" is the class of a vehicle
    assert open_images(str(tmp_path)).train.classes == ("car", "train")


def test_names_that_are_not_unicode(tmp_path: Path) -> None:
    for number in range(3):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff%d.png" % number)).write_bytes(png(number))
    splits = open_images(str(tmp_path))
    assert sorted(values(splits.train) + values(splits.evaluation)) == [0, 1, 2]
    assert splits.train.fingerprint
    assert splits.train.identify(0).encode()


_PATHS = st.lists(
    st.lists(st.sampled_from(["a", "B", "é", "train", "x y"]), min_size=0, max_size=3).map(tuple),
    min_size=2,
    max_size=25,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_PATHS, st.randoms(use_true_random=False))
def test_order_does_not_depend_on_creation(
    tmp_path_factory: pytest.TempPathFactory, folders: list[tuple[str, ...]], random: Any
) -> None:
    files = [Path(*folder) / f"{number}.png" for number, folder in enumerate(folders)]
    shuffled = random.sample(files, len(files))
    listings, fingerprints = [], set()
    for order in (files, shuffled):
        root = tmp_path_factory.mktemp("tree")
        for file in order:
            (root / file.parent).mkdir(parents=True, exist_ok=True)
            (root / file).touch()
        splits = open_images(str(root))
        both = [
            [str(Path(name).relative_to(root)) for name in names(source)]
            for source in (splits.train, splits.evaluation)
        ]
        listings.append(both)
        fingerprints.add((splits.train.fingerprint, splits.evaluation.fingerprint))
    assert listings[0] == listings[1]
    assert len(fingerprints) == 1
    assert sorted(listings[0][0] + listings[0][1]) == sorted(map(str, files))  # each file in exactly one split


@pytest.mark.parametrize("count", [2, 9, 10, 11, 200])
def test_held_out_images_are_spread_and_fixed(tmp_path: Path, count: int) -> None:
    for number in range(count):
        (tmp_path / f"{number:03}.png").touch()
    splits = open_images(str(tmp_path))
    assert len(splits.evaluation) == max(1, count // 10)
    held = [int(Path(name).stem) for name in names(splits.evaluation)]
    assert held == sorted(held)
    if count == 200:  # pinned, because a change would move images between the splits of existing runs
        assert held[:5] == [2, 32, 33, 41, 42]
        assert np.ptp(held) > 150
