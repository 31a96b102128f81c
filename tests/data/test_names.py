"""The names of splits: whole words, pairs of folders, and wrappers of archives."""

from __future__ import annotations

from pathlib import Path

import pytest

from pecobook.data.names import (
    group_by_split,
    inside_wrapper,
    is_split_folder,
    split_folders,
    split_of_path,
)


@pytest.mark.parametrize(
    ("split", "names"),
    [
        (
            "train",
            ("train-00000-of-00002.parquet", "Training", "training_set", "trainset.tar", "train2017", "TrainImages"),
        ),
        ("validation", ("valid", "imagenet_val.parquet", "imagenet-val-003.tar", "dev", "evaluation", "ValidationSet")),
        ("test", ("data-test-00000-of-00001.parquet", "data/test/0000.tar", "testing", "TEST_SET", "x\\test\\0.tar")),
        ("train", ("train/value.parquet", "dev-train-0.tar", "train-0001.tar", "TrainImages")),
        (None, ("testaccio.tar", "valencia.parquet", "contest.tar", "retrain.tar", "cat_0.tar", "trains", "device")),
    ],
)
def test_whole_words_declare_a_split(split: str | None, names: tuple[str, ...]) -> None:
    assert {name: split_of_path(name) for name in names} == dict.fromkeys(names, split)


def test_files_without_a_split() -> None:
    assert group_by_split(["a", "b"]) == ({"train": [0, 1]}, [])
    assert group_by_split(["a", "test"]) == ({"train": [0], "test": [1]}, [])
    assert group_by_split(["test", "val"]) == ({"train": [0, 1]}, [])
    assert group_by_split(["train", "a", "test"]) == ({"train": [0], "test": [2]}, [1])


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("train valid", {"train": "train", "valid": "validation"}),
        ("Training Testing", {"Training": "train", "Testing": "test"}),
        ("training_set test_set docs", {"training_set": "train", "test_set": "test"}),
        ("train dev", {"train": "train", "dev": "validation"}),
        ("train evaluation", {"train": "train", "evaluation": "validation"}),
        ("seg_train seg_test seg_pred", {"seg_train": "train", "seg_test": "test"}),
        ("train train_extra test", {"train": "train", "test": "test"}),
        ("train_1 train_2 test", {"train_1": "train", "train_2": "train", "test": "test"}),
        ("cooking swimming training", {}),
        ("car test_drive train", {}),
        ("car plane train", {}),
        ("cat test", {}),
    ],
)
def test_folders_declare_splits_together(names: str, splits: dict[str, str]) -> None:
    assert split_folders(names.split()) == splits


def test_a_wrapper_is_entered(tmp_path: Path) -> None:
    inner = tmp_path / "archive" / "data"
    for folder in (inner / "train", inner / "test", tmp_path / "__MACOSX", tmp_path / ".git"):
        folder.mkdir(parents=True)
    (tmp_path / "README.md").touch()
    assert inside_wrapper(tmp_path) == inner
    (tmp_path / "archive" / "instances.json").touch()
    assert inside_wrapper(tmp_path) == tmp_path / "archive"
    (inner / "test").rmdir()
    assert inside_wrapper(inner) == inner  # a single folder train/ is a split


def test_is_split_folder() -> None:
    assert [name for name in ("Test", "dev", "test_set", "test_2", "cat") if is_split_folder(name)] == [
        "Test",
        "dev",
        "test_set",
    ]
