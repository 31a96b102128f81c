"""Where files of annotations and images lie, in the layouts that tools write, and formats that are not read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from pecobook.data.dense.detection import DetectionSource, open_detection
from pecobook.errors import DataError
from tests.coco import Content, change, make_coco, notes_of, read_coco, same_objects, train_of, write_coco


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "data")


def rename_files(rename: Callable[[str], str]) -> Callable[[Content], None]:
    def edit(content: Content) -> None:
        for image in content["images"]:
            image["file_name"] = rename(image["file_name"])

    return edit


@pytest.mark.parametrize("prefix", ["images\\", "images/", "C:\\work\\", "/home/me/data/images/", "../x/"])
def test_open__finds_images_by_the_end_of_their_path(prefix: str, root: Path) -> None:
    expected = train_of(root)
    change(root, rename_files(lambda name: prefix + name))
    train = train_of(root)
    assert same_objects(train, expected)
    assert train.identify(0) == expected.identify(0)


def test_open__two_images_with_the_same_file(root: Path) -> None:
    change(root, lambda content: content["images"][3].update(file_name="old/1-1.png"), ("train",))
    with pytest.raises(DataError, match=r"image 121 'old/1-1.png' is the file of another image too: 1-1.png"):
        open_detection(str(root))


def test_open__a_pipe_is_not_an_image(root: Path) -> None:
    os.mkfifo(root / "train" / "images" / "pipe.png")
    change(root, lambda content: content["images"][3].update(file_name="pipe.png"), ("train",))
    with pytest.raises(DataError, match=r"image 121 'pipe\.png' is not in "):
        open_detection(str(root))


LAYOUTS = {
    "annotations/train.json": ("annotations/train.json", "annotations/val.json", "train", "val"),
    "COCO": ("annotations/instances_train2017.json", "annotations/instances_val2017.json", "train2017", "val2017"),
    "COCO in images": (
        "annotations/instances_train2017.json",
        "annotations/instances_val2017.json",
        "images",
        "images",
    ),
    "images/train": (
        "annotations/instances_train.json",
        "annotations/instances_val.json",
        "images/train",
        "images/val",
    ),
    "Roboflow": ("train/_annotations.coco.json", "valid/_annotations.coco.json", "train", "valid"),
    "top": ("train.json", "val.json", "images", "images"),
    "FiftyOne with splits": ("train/labels.json", "validation/labels.json", "train/data", "validation/data"),
    "another name": ("train/objects.json", "val/objects.json", "train/images", "val/images"),
    "labels/": ("labels/train.json", "labels/val.json", "images/train", "images/val"),
    "capitals": ("Annotations/Train.json", "Annotations/Val.json", "Images", "Images"),
    "annotations/train/": ("annotations/train/a.json", "annotations/val/b.json", "images/train", "images/val"),
    "train/annotations/": ("train/annotations/a.json", "val/labels/b.json", "train/images", "val/images"),
    "keypoints": (
        "annotations/person_keypoints_train2017.json",
        "annotations/person_keypoints_val2017.json",
        "train2017",
        "val2017",
    ),
    "other folders of images": (
        "annotations/train.json",
        "annotations/val.json",
        "photos/100k/train",
        "photos/100k/val",
    ),
    "data/train": ("annotations/train.json", "annotations/val.json", "data/train", "data/val"),
    "one folder deeper": ("x/train/a.json", "x/val/a.json", "x/train/images", "x/val/images"),
}
SINGLE_LAYOUTS = {
    "CVAT": ("annotations/instances_default.json", "images"),
    "CVAT with its subset": ("annotations/instances_default.json", "images/default"),
    "Label Studio": ("result.json", "images"),
    "FiftyOne": ("labels.json", "data"),
}


def move(source: Path, split: str, target: Path, file: str, folder: str) -> None:
    (target / file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source / split / "images", target / folder, dirs_exist_ok=True)
    shutil.copy(source / split / "instances.json", target / file)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_open__layouts_of_other_tools(name: str, root: Path, tmp_path: Path) -> None:
    train, evaluation, train_images, evaluation_images = LAYOUTS[name]
    target = tmp_path / "target"
    move(root, "train", target, train, train_images)
    move(root, "val", target, evaluation, evaluation_images)
    splits = open_detection(str(target))
    assert (len(splits.train), len(splits.evaluation), splits.evaluation_name) == (10, 4, "validation")
    assert same_objects(cast("DetectionSource", splits.train), train_of(root))


@pytest.mark.parametrize("name", list(SINGLE_LAYOUTS))
def test_open__layouts_of_tools_without_splits(name: str, root: Path, tmp_path: Path) -> None:
    move(root, "train", tmp_path / "target", *SINGLE_LAYOUTS[name])
    splits = open_detection(str(tmp_path / "target"))
    assert (len(splits.train), len(splits.evaluation), splits.evaluation_name) == (9, 1, "held-out 10% of train")
    held_out = cast("DetectionSource", splits.evaluation)
    assert held_out.left_out == {}
    assert cast("DetectionSource", splits.train).left_out == {"crowds (iscrowd 1)": 1}


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ("labels/1.xml", "Pascal VOC's XML"),
        ("Annotations/1.xml JPEGImages/1.jpg ImageSets/Main/train.txt", "Pascal VOC's XML"),
        ("train/1.xml train/1.jpg train/2.xml train/2.jpg", "Pascal VOC's XML"),
        ("labels/1.txt", "YOLO's text files"),
        ("images/train/1.jpg labels/train/1.txt labels/train/classes.txt data.yaml", "YOLO's text files"),
        ("annotations.xml images/1.jpg", r"CVAT's XML \(CVAT also exports COCO 1.0\)"),
        ("samples.json metadata.json data/1.jpg", "FiftyOne's own files .*"),
        ("1.jpg 1.json 2.jpg 2.json", "JSON files for each image, as of labelme,"),
    ],
)
def test_open__names_a_format_that_is_not_read(tmp_path: Path, names: str, kind: str) -> None:
    for name in names.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("0 0.5 0.5 0.1 0.1")
    with pytest.raises(DataError, match=f"{kind} cannot be read"):
        open_detection(str(tmp_path))


def test_open__finds_images_in_other_spellings(root: Path) -> None:
    folder = root / "train" / "images"
    (folder / "1-1.png").rename(folder / "a b.png")
    (folder / "1-2.png").rename(folder / "e\u0301.png")  # as macOS writes it
    change(root, lambda content: content["images"][1].update(file_name="/data/upload/a%20b.png"), ("train",))
    change(root, lambda content: content["images"][2].update(file_name="\u00e9.png"), ("train",))
    train = train_of(root)
    assert train.identify(1).endswith("a b.png")
    assert train.read(2).shape == (3, 52, 40)


@pytest.mark.parametrize(
    "written",
    [
        "https://host/x/a%20b.png?X-Signature=1",
        "/data/local-files/?d=a b.png",
        "\\data\\local-files\\?d=my%20set%2Fa%20b.png",
        "s3://bucket/folder/a b.png",
        "images/0a1b2c3d-a b.png",
        "images\\0a1b2c3d-a_b.png",
    ],
)
def test_open__finds_the_images_of_label_studio(written: str, root: Path) -> None:
    (root / "train" / "images" / "1-1.png").rename(root / "train" / "images" / "a b.png")
    change(root, lambda content: content["images"][1].update(file_name=written), ("train",))
    assert train_of(root).identify(1).endswith("images/a b.png")


def test_open__does_not_take_the_images_of_another_split(root: Path) -> None:
    shutil.rmtree(root / "val" / "images")
    for file in list((root / "train" / "images").iterdir()):
        file.rename(file.with_name(file.name.replace("1-", "2-")))
    change(root, rename_files(lambda name: name.replace("1-", "2-")), ("train",))
    (root / "annotations").mkdir()
    for split in ("train", "val"):
        (root / split / "instances.json").rename(root / "annotations" / f"{split}.json")
    with pytest.raises(DataError, match=r"annotations/val\.json: image \d+ '2-0\.png' is not in "):
        open_detection(str(root))


def test_open__names_annotations_that_lie_where_none_are_looked_for(root: Path, tmp_path: Path) -> None:
    move(root, "train", tmp_path / "target", "meta/export/final.json", "pictures")
    with pytest.raises(DataError, match=r"meta/export/final\.json has that format, but lies where none are looked for"):
        open_detection(str(tmp_path / "target"))


def test_open__other_json_files_do_not_matter(root: Path, tmp_path: Path) -> None:
    move(root, "train", tmp_path / "target", "mine.json", "images")
    (tmp_path / "target" / "meta.json").write_text(json.dumps({"version": 1}))
    assert len(open_detection(str(tmp_path / "target")).train) == 9


def test_open__files_whose_names_differ_in_case_or_extension(root: Path) -> None:
    expected = train_of(root)
    change(root, rename_files(lambda name: "C:\\Images\\" + name.upper()))
    assert same_objects(train_of(root), expected)
    change(root, rename_files(lambda name: name.lower().replace(".png", ".jpg")), ("train",))
    with pytest.raises(
        DataError, match=r"1-0\.jpg' is not in .*train/images, but '1-0\.png' is\. \(9 more like this\)"
    ):
        open_detection(str(root))


def test_open__without_held_out_objects_some_training_images_are_held_out(root: Path) -> None:
    content = read_coco(root / "val")
    (root / "val").rename(root / "test")
    write_coco(root / "test", {**content, "annotations": []})
    splits = open_detection(str(root))
    assert (len(splits.train), splits.evaluation_name) == (9, "held-out 10% of train")
    note = f"{root}/test/instances.json: holds no object, so that 10% of the training images are held out."
    assert note in splits.notes


@pytest.mark.parametrize("group", ["none", "root", "shapes"])
def test_open__a_group_without_objects_is_no_class(group: str, root: Path) -> None:
    expected = train_of(root)

    def edit(content: dict[str, Any]) -> None:
        categories = [{**category, "supercategory": "shapes"} for category in content["categories"]]
        content["categories"] = [{"id": 0, "name": "shapes", "supercategory": group}, *categories]

    change(root, edit)
    assert train_of(root).classes == expected.classes
    assert same_objects(train_of(root), expected)


def test_open__names_images_of_both_splits(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    move(root, "train", target, "annotations/train.json", "images")
    move(root, "val", target, "annotations/val.json", "images")
    assert not any("training images too" in note for note in notes_of(target))
    shutil.copy(target / "annotations/train.json", target / "annotations/val.json")
    assert any("10 held-out images are training images too" in note for note in notes_of(target))
