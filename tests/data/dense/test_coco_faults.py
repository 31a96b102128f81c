"""Files of annotations as tools write them, and faults that no single object shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pecobook.data.dense.coco_check import compare_boxes, diagnose_boxes
from pecobook.data.dense.coco_values import as_flag, as_integer, as_number, decompress, runs_box
from pecobook.data.dense.detection import open_detection
from pecobook.data.source import kind_of
from pecobook.errors import DataError
from tests.coco import (
    Content,
    change,
    compressed,
    each,
    make_coco,
    make_split,
    notes_of,
    read_coco,
    same_objects,
    states,
    train_of,
    uncompressed,
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "data")


# --------------------------------------------------------------------------------------------------------------- values


def test_values__numbers_and_flags_as_text() -> None:
    assert [as_integer(value) for value in (7, 7.0, "7", " 007 ", "7.0", 7.5, "7.5", "x", "", True, None, 2**70)] == [
        *[7] * 5,
        *[None] * 7,
    ]
    assert [as_number(value) for value in (1.5, "1.5", "1e1", "nan", "x", None, True)] == [1.5, 1.5, 10, *[None] * 4]
    assert [as_flag(value) for value in (0, "0", 0.0, False, None, "false", 1, "1", True, "True")] == [
        *[False] * 6,
        *[True] * 4,
    ]
    for value in (2, "yes", [0]):
        with pytest.raises(ValueError, match="'iscrowd' that is neither 0 nor 1"):
            as_flag(value)


def test_open__numbers_written_as_text_are_read_as_numbers(root: Path) -> None:
    expected = train_of(root)
    change(
        root,
        each(
            iscrowd=lambda entry: str(entry["iscrowd"]),
            bbox=lambda entry: [str(value) for value in entry["bbox"]],
            category_id=lambda entry: str(entry["category_id"]),
            image_id=lambda entry: float(entry["image_id"]),
            area=lambda entry: str(entry["area"]),
            segmentation=lambda entry: (
                [[str(value) for value in polygon] for polygon in entry["segmentation"]]
                if isinstance(entry["segmentation"], list)
                else {**entry["segmentation"], "size": [str(side) for side in entry["segmentation"]["size"]]}
            ),
        ),
    )
    change(root, states(lambda image: image.update(width=str(image["width"]))))
    found = train_of(root)
    assert same_objects(found, expected)
    assert found.ground_truth(range(10)) == expected.ground_truth(range(10))
    assert found.left_out == {"crowds (iscrowd 1)": 1}


def test_open__names_a_size_that_is_no_number(root: Path) -> None:
    change(root, lambda content: content["images"][3].update(height="tall"), ("train",))
    with pytest.raises(DataError, match='image 121 states a height that is not an integer: "tall"'):
        open_detection(str(root))


# ------------------------------------------------------------------------------------------------------ nothing is left


def test_open__refuses_annotations_that_are_all_crowds(root: Path) -> None:
    count = len(read_coco(root / "train")["annotations"])
    change(root, each(iscrowd=lambda _: 1), ("train",))
    for skip_bad in (False, True):
        with pytest.raises(DataError) as caught:
            open_detection(str(root), skip_bad=skip_bad)
        assert f"none of {count} objects of {root}/train/instances.json can be used: {count} crowds" in str(
            caught.value
        )
        assert "set iscrowd to 0" in str(caught.value)
    change(root, each(iscrowd=lambda _: 0), ("train",))
    change(root, each(iscrowd=lambda _: 1), ("val",))
    with pytest.raises(DataError, match=r"val/instances.json can be used"):
        open_detection(str(root))


def test_open__says_that_many_objects_are_crowds(root: Path) -> None:
    def edit(content: Content) -> None:
        for entry in content["annotations"][::2]:
            entry["iscrowd"] = 1

    change(root, edit, ("train",))
    note = next(note for note in open_detection(str(root)).notes if "crowds" in note)
    num_objects = len(read_coco(root / "train")["annotations"])
    num_crowds = sum(entry["iscrowd"] for entry in read_coco(root / "train")["annotations"])
    assert f"train/instances.json: {num_crowds} of {num_objects} objects are crowds (iscrowd 1)." in note
    assert kind_of(note) == "lost labels"


def test_open__refuses_annotations_of_which_less_than_a_tenth_is_left(root: Path) -> None:
    change(root, each(bbox=lambda entry: entry["bbox"] if entry["id"] == 3 else [3, 3, 0, 0]), ("train",))
    count = len(read_coco(root / "train")["annotations"])
    with pytest.raises(DataError, match=rf"1 of {count} objects .* can be used: {count - 1} objects without area"):
        open_detection(str(root))
    train = train_of(root, skip_bad=True)
    assert sum(train.objects_per_class().values()) == 1
    assert any("9 of 10 training images have no object" in note for note in notes_of(root, skip_bad=True))


def test_open__a_test_split_without_objects_leaves_its_place_to_validation(root: Path) -> None:
    make_split(root / "test", 3, seed=5)
    change(root, lambda content: content.update(annotations=[]), ("test",))
    splits = open_detection(str(root))
    assert (len(splits.evaluation), splits.evaluation_name) == (4, "validation")
    assert any("test/instances.json: holds no object" in note for note in splits.notes)


# ------------------------------------------------------------------------------------------------- conventions of boxes


def relative(content: Content) -> None:
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for entry in content["annotations"]:
        (width, height), (x, y, w, h) = sizes[entry["image_id"]], entry["bbox"]
        entry["bbox"] = [x / width, y / height, w / width, h / height]


def percent(content: Content) -> None:
    relative(content)
    for entry in content["annotations"]:
        entry["bbox"] = [100 * value for value in entry["bbox"]]


def corners(entry: Content) -> list[float]:
    x, y, w, h = entry["bbox"]
    return [x, y, x + w, y + h]


def centre(entry: Content) -> list[float]:
    x, y, w, h = entry["bbox"]
    return [x + w / 2, y + h / 2, w, h]


CONVENTIONS: dict[str, tuple[Callable[[Content], None], str]] = {
    "shares": (relative, "boxes lie between 0 and 1"),
    "percent": (percent, "percentages of the image's width and height"),
    "corners": (each(bbox=corners), "left, top, right and bottom"),
    "centre": (each(bbox=centre), "the centre, width and height"),
    "swapped": (each(bbox=lambda entry: [entry["bbox"][n] for n in (1, 0, 3, 2)]), "rows and columns"),
    "smaller": (each(bbox=lambda entry: [value / 2 for value in entry["bbox"]]), "images of another size"),
}


@pytest.mark.parametrize("name", list(CONVENTIONS))
def test_open__refuses_boxes_of_another_convention_than_their_masks(name: str, root: Path) -> None:
    edit, cause = CONVENTIONS[name]
    change(root, edit, ("train",))
    with pytest.raises(DataError) as caught:
        open_detection(str(root), skip_bad=True)
    assert cause in str(caught.value)
    assert f"{root}/train/instances.json: " in str(caught.value)


@pytest.mark.parametrize("name", ["shares", "corners", "larger"])
def test_open__refuses_boxes_of_another_convention_without_masks(name: str, tmp_path: Path) -> None:
    root = make_coco(tmp_path, train=30, masks=False)
    edit, cause = CONVENTIONS.get(name, (each(bbox=lambda e: [4 * value for value in e["bbox"]]), "another size"))
    change(root, edit, ("train",))
    with pytest.raises(DataError) as caught:
        open_detection(str(root), skip_bad=True)
    assert cause in str(caught.value)


def test_diagnose_boxes__accepts_boxes_in_pixels() -> None:
    rng = np.random.default_rng(0)
    sizes = np.tile([100.0, 200.0], (50, 1))
    start = rng.uniform(0, [150, 70], (50, 2))
    boxes = np.c_[start, rng.uniform(2, 30, (50, 2))]
    assert diagnose_boxes(boxes, sizes) == ""
    boxes[:5, 0] += 190  # a tenth reaches beyond
    assert diagnose_boxes(boxes, sizes) == ""
    assert "left, top" in diagnose_boxes(np.c_[start, start + 25], sizes)
    assert "the centre" in diagnose_boxes(np.tile([[160.0, 60, 80, 70]], (6, 1)), sizes[:6])
    assert diagnose_boxes(np.zeros((0, 4)), np.zeros((0, 2))) == ""


def test_open__says_that_all_boxes_lie_in_one_corner(tmp_path: Path) -> None:
    root = make_coco(tmp_path, train=30, masks=False)
    change(root, each(bbox=lambda entry: [value / 2 for value in entry["bbox"]]), ("train",))
    assert any("all boxes lie in the upper left quarter" in note for note in notes_of(root))


def by_rows(entry: Content) -> Any:
    """Return the run lengths of the same mask, row by row."""
    from pycocotools import mask as coco

    height, width = entry["size"]
    segment = entry["segmentation"]
    runs = coco.frPyObjects(segment, height, width)
    mask = coco.decode(coco.merge(runs) if isinstance(runs, list) else runs)
    return {"size": [height, width], "counts": uncompressed(mask.T)["counts"]}


@pytest.mark.parametrize("has_boxes", [True, False])
def test_open__refuses_run_lengths_along_the_rows(has_boxes: bool, root: Path) -> None:
    def edit(content: Content) -> None:
        sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
        for entry in content["annotations"]:
            if isinstance(entry["segmentation"], dict) and isinstance(entry["segmentation"]["counts"], str):
                continue
            entry["segmentation"] = by_rows({**entry, "size": sizes[entry["image_id"]]})
            if not has_boxes:
                entry.pop("bbox")
        content["annotations"] = [e for e in content["annotations"] if isinstance(e["segmentation"]["counts"], list)]

    change(root, edit, ("train",))
    with pytest.raises(DataError, match="the run lengths seem to go along the rows"):
        open_detection(str(root), skip_bad=True)


def test_compare_boxes__counts_single_boxes_that_do_not_fit(root: Path) -> None:
    change(root, lambda content: content["annotations"][4].update(bbox=[0, 0, 5, 5]), ("train",))
    train = train_of(root)
    comparison = compare_boxes(train.annotations)
    assert (comparison.compared, len(comparison.differing), comparison.cause) == (17, 1, "")
    assert train.annotations.boxes[comparison.differing[0]].tolist() == [0, 0, 5, 5]
    assert any("1 of 17 boxes do not fit the masks of their objects, the first in image" in n for n in notes_of(root))
    assert compare_boxes(train.annotations, limit=3).compared == 3


def test_runs_box__agrees_with_the_mask() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = np.zeros((30, 40), bool)
        top, left = rng.integers(0, 20, 2)
        mask[top : top + 7, left : left + 9] = rng.random((7, 9)) < 0.6
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        expected = [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert list(runs_box(decompress(compressed(mask)["counts"]), 30, 40)) == expected
        assert list(runs_box(decompress(compressed(mask.T)["counts"]), 30, 40, by_rows=True)) == expected


# ------------------------------------------------------------------------------------------------------------- polygons


def test_open__leaves_out_a_polygon_of_two_points_and_keeps_its_object(root: Path) -> None:
    expected = train_of(root)
    polygons = [e for e in read_coco(root / "train")["annotations"] if isinstance(e["segmentation"], list)]

    def edit(content: Content) -> None:
        for entry in content["annotations"]:
            if entry["id"] == polygons[0]["id"]:
                entry["segmentation"].append([1, 2, 3, 4])
            if entry["id"] == polygons[1]["id"]:
                entry["segmentation"] = entry["segmentation"][0]  # a list of numbers
            if entry["id"] == polygons[2]["id"]:
                entry["segmentation"] = np.array(entry["segmentation"][0]).reshape(-1, 2).tolist()  # a list of points

    change(root, edit, ("train",))
    found = train_of(root)
    assert same_objects(found, expected)
    assert f"{root}/train/instances.json: 1 polygon of fewer than three points left out." in notes_of(root)


# ----------------------------------------------------------------------------------------------------------- categories


def test_open__the_root_category_of_roboflow_is_left_out(root: Path) -> None:
    group = {"id": 0, "name": "shapes", "supercategory": "none"}
    twice = {"id": 1, "name": "disc", "supercategory": "none"}
    expected = train_of(root)

    def edit(content: Content) -> None:
        content["categories"] = [group, twice, *({**c, "supercategory": "shapes"} for c in content["categories"])]

    change(root, edit)
    train = train_of(root)
    assert (train.classes, train.category_ids) == (("disc", "square $x_", "never"), (3, 17, 90))
    assert same_objects(train, expected)
    file = root / "train" / "instances.json"
    for number, name in ((0, "shapes"), (1, "disc")):
        start = f"{file}: category {number} '{name}' is left out: it has no object"
        assert any(note.startswith(start) for note in notes_of(root))
    change(root, lambda content: content["annotations"][0].update(category_id=0), ("train",))
    assert train_of(root).classes[0] == "shapes"  # it has an object


def test_open__stated_sizes_may_be_missing(root: Path) -> None:
    expected = train_of(root)
    change(root, states(lambda image: (image.pop("width"), image.pop("height"))))
    assert same_objects(train_of(root), expected)


def test_open__lvis_states_addresses(root: Path) -> None:
    expected = train_of(root)
    change(root, states(lambda image: image.update(coco_url=f"http://x/images/{image.pop('file_name')}")))
    assert same_objects(train_of(root), expected)


def test_open__counts_images_that_no_annotations_name(root: Path) -> None:
    for name in ("a.png", "b.JPG", "notes.txt"):
        (root / "train" / "images" / name).write_bytes(b"x")
    assert train_of(root).left_out == {"crowds (iscrowd 1)": 1, "images that no annotations name": 2}


def test_open__says_which_boxes_and_masks_are_too_small(root: Path) -> None:
    def edit(content: Content) -> None:
        content["annotations"][0].update(segmentation=[[5, 5, 5.2, 5, 5.2, 5.2]])
        content["annotations"][1].update(bbox=[5, 5, 0.5, 9])

    change(root, edit, ("train",))
    notes = notes_of(root)
    assert any("1 of 17 masks are too thin to cover a pixel, and are not learned" in note for note in notes)
    assert any("1 boxes are narrower than a pixel" in note for note in notes)


def test_open__names_categories_that_differ_only_in_case(root: Path) -> None:
    change(root, lambda content: content["categories"].append({"id": 4, "name": " Disc"}))
    assert any("the categories 'disc' and ' Disc' differ only in case" in note for note in notes_of(root))
