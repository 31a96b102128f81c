"""What folders mean: wrappers, splits, classes, masks, and what is refused because it cannot be told."""

from __future__ import annotations

import pytest

from pecobook.data.layout import read_layout
from pecobook.errors import DataError


def read(paths: str) -> dict[str, tuple[str, str | None]]:
    """Return (split, class) of each folder."""
    names = paths.split()
    layout = read_layout("data", [tuple(part for part in name.split("/") if part != ".") for name in names])
    return dict(zip(names, zip(layout.split_of, layout.class_of, strict=True), strict=True))


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ("cat dog", "train:cat train:dog"),
        (".", "train:"),
        ("x/y/cat x/y/dog", "train:cat train:dog"),
        ("images", "train:"),
        # splits
        ("train/a train/b valid/a", "train:a train:b validation:a"),
        ("x/train/a x/train/b x/test/b", "train:a train:b test:b"),
        ("seg_train/seg_train/a seg_train/seg_train/b seg_test/seg_test/a", "train:a train:b test:a"),
        ("train/images test/images", "train: test:"),
        ("train/a train/b val/images", "train:a train:b validation:"),
        ("train/a train/b val/dogs", "train:a train:b validation:dogs"),
        ("train/a train/b val", "train:a train:b validation:"),
        ("train/a train/b test/a demo .", "train:a train:b test:a : :"),
        ("train/a/deep train/b test/a", "train:a train:b test:a"),
        # classes with splits of their own
        ("cat/train cat/test dog/train dog/test dog/extra", "train:cat test:cat train:dog test:dog :dog"),
        ("cup/train/good cup/test/bad nut/train/good nut/test/bad", "train:cup test:cup train:nut test:nut"),
        # classes that have the name of a split
        ("cooking swimming training", "train:cooking train:swimming train:training"),
        ("cat dog test", "train:cat train:dog train:test"),
        ("train/1 car/1 plane/1", "train:train train:car train:plane"),
        ("train/train train/test train/bus", "train:train train:test train:bus"),
        # masks
        ("images masks", "train: :"),
        ("images/training annotations/training images/validation", "train: : validation:"),
        ("images/001.crow segmentations/001.crow images/002.wren", "train:001.crow : train:002.wren"),
        ("train train_masks", "train: :"),
        ("data labels", "train: :"),
        ("data labels other", "train:data train:labels train:other"),
        ("train trainannot val valannot", "train: : validation: :"),
        ("masks_train images_train masks_val images_val", ": train: : validation:"),
        ("face face_mask", "train:face train:face_mask"),
        ("masks scarves", "train:masks train:scarves"),
        ("train/images train/masks val/images val/masks", "train: : validation: :"),
    ],
)
def test_layout(folders: str, expected: str) -> None:
    found = [f"{split}:{name or ''}" for split, name in read(folders).values()]
    assert found == expected.split()


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ("x/train x/test logo", "'test', 'train' inside 'x' look like splits.*Give --data 'data/x'"),
        ("a/x/train a/x/test a/logo", "Give --data 'data/a/x'"),
        ("x/train x/test .", "Give --data 'data/x'"),
        ("cat dog test/cat test/dog", "'test' looks like a split.*'cat', 'dog'"),
        ("train/cat train/dog holdout/cat holdout/dog", "'train' looks like a split.*'holdout'"),
        ("learn/cat learn/dog test/cat test/dog", "'test' looks like a split.*'learn'"),
        ("1/train/a 1/train/b 1/val/a 2/train/a 2/train/b 2/val/a", "'1' and '2' hold splits.*Give one.*'data/1'"),
        ("train test bus car", "'test', 'train' may be splits, or classes as 'bus', 'car' may be"),
    ],
)
def test_layouts_that_are_refused(folders: str, message: str) -> None:
    with pytest.raises(DataError, match=f"(?s){message}"):
        read(folders)


def test_folders_with_the_same_subfolders_are_taken_for_classes_with_a_note() -> None:
    folders = [(fold, name) for fold in ("fold0", "fold1") for name in ("cat", "dog")]
    (note,) = read_layout("data", folders).notes
    assert note == "'fold0', 'fold1': taken for classes, though each of them holds 'cat', 'dog'."
    assert read_layout("data", [("n1", "images"), ("n2", "images")]).notes == ()
    parts = [(part, "train", name) for part in ("part0", "part1") for name in ("cat", "dog")]
    assert read_layout("data", parts).notes == (
        "'part0', 'part1': taken for classes, though each of them holds 'train'.",
    )
