from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO

from pecobook.data.decode import BadImage
from pecobook.data.dense.coco_values import decode_masks, decompress
from pecobook.data.dense.detection import DetectionSource, open_detection
from pecobook.errors import DataError
from tests.coco import compressed, make_coco, make_split, read_coco, uncompressed, write_coco


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "data")


def sources(data: Path, **options: Any) -> tuple[DetectionSource, DetectionSource]:
    splits = open_detection(str(data), **options)
    return cast("DetectionSource", splits.train), cast("DetectionSource", splits.evaluation)


def test_open__objects_agree_with_pycocotools(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, evaluation = sources(root)
    assert train.classes == evaluation.classes == ("disc", "square $x_", "never")
    assert train.category_ids == (3, 17, 90)
    never = "1 of 3 classes have no object"
    crowds, *others = open_detection(str(root)).notes
    assert crowds.startswith(
        f"{root}/val/instances.json: 1 of 6 objects are crowds (iscrowd 1). A crowd is many objects"
    )
    assert tuple(others) == (
        f"--data '{root}': {never} in training, and are not learned: never.",
        f"--data '{root}': {never} among the held-out images, and do not count in the average precision: never.",
    )
    num_crowds = 0
    for source, split in ((train, "train"), (evaluation, "val")):
        reference = COCO(str(root / split / "instances.json"))
        assert len(source) == len(reference.imgs)
        for index in range(len(source)):
            image, objects = source.sample(index)
            entry = reference.imgs[source.image_id(index)]
            with Image.open(root / split / "images" / entry["file_name"]) as picture:
                assert torch.equal(image, torch.from_numpy(np.array(picture)).permute(2, 0, 1))
            expected = reference.imgToAnns[source.image_id(index)]
            num_crowds += sum(item["iscrowd"] for item in expected)
            expected = [item for item in expected if not item["iscrowd"]]
            x, y, w, h = np.array([item["bbox"] for item in expected]).reshape(-1, 4).T
            assert objects.boxes.tolist() == np.stack([x, y, x + w, y + h], 1).tolist()
            categories = [source.category_ids[label - 1] for label in objects.labels]
            assert categories == [item["category_id"] for item in expected]
            masks = objects.masks()
            assert masks is not None
            assert masks.shape == (len(expected), *image.shape[1:])
            for mask, item in zip(masks, expected, strict=True):
                assert np.array_equal(mask.numpy(), reference.annToMask(item))
    assert num_crowds == 2
    assert len(train.objects(0).labels) == 0


def test_open__survives_pickling_and_a_subset(root: Path) -> None:
    train, _ = sources(root)
    part = pickle.loads(pickle.dumps(train)).subset([4, 2])
    for place, index in enumerate((4, 2)):
        assert part.image_id(place) == train.image_id(index)
        assert torch.equal(part.objects(place).boxes, train.objects(index).boxes)
        assert torch.equal(part.read(place), train.read(index))
    before = train.fingerprint
    assert sources(root)[0].fingerprint == before
    content = read_coco(root / "train")
    content["annotations"][0]["bbox"][2] -= 1
    write_coco(root / "train", content)
    assert sources(root)[0].fingerprint != before


def test_open__the_layout_of_coco_and_a_single_file(root: Path, tmp_path: Path) -> None:
    official = tmp_path / "official"
    (official / "annotations").mkdir(parents=True)
    for split, name in (("train", "train2017"), ("val", "val2017")):
        (root / split / "instances.json").rename(official / "annotations" / f"instances_{name}.json")
        (root / split / "images").rename(official / name)
    (official / "annotations" / "person_keypoints_train2017.json").write_text("{}")
    splits = open_detection(str(official))
    assert (len(splits.train), len(splits.evaluation), splits.evaluation_name) == (10, 4, "validation")

    make_split(tmp_path / "alone", 20, seed=3)
    (tmp_path / "alone" / "instances.json").rename(tmp_path / "alone" / "_annotations.coco.json")
    splits = open_detection(str(tmp_path / "alone"))
    assert (len(splits.train), len(splits.evaluation), splits.evaluation_name) == (18, 2, "held-out 10% of train")
    assert isinstance(splits.evaluation, DetectionSource)
    assert splits.evaluation.split == "evaluation"
    names = {splits.train.identify(i) for i in range(18)} | {splits.evaluation.identify(i) for i in range(2)}
    assert len(names) == 20


def test_open__test_is_preferred_to_validation(root: Path) -> None:
    make_split(root / "test", 3, seed=5)
    splits = open_detection(str(root))
    assert (len(splits.evaluation), splits.evaluation_name) == (3, "test")


def test_open__boxes_without_masks(tmp_path: Path) -> None:
    train, evaluation = sources(make_coco(tmp_path / "data", masks=False))
    assert not train.has_masks
    assert train.objects(3).masks() is None
    assert "segmentation" not in evaluation.ground_truth([1])["annotations"][0]
    splits = open_detection(str(make_coco(tmp_path / "masked")), masks=False)
    assert not cast("DetectionSource", splits.train).has_masks


def test_open__exif_rotates_the_image_before_sizes_are_compared(root: Path) -> None:
    content = read_coco(root / "train")
    image = content["images"][2]
    turned = Image.new("RGB", (image["height"], image["width"]), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    image["file_name"] = "turned.jpg"
    turned.save(root / "train" / "images" / "turned.jpg", exif=exif)
    write_coco(root / "train", content)
    train, _ = sources(root)
    assert train.sample(2)[0].shape == (3, image["height"], image["width"])


def edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        content = read_coco(folder)
        change(content)
        write_coco(folder, content)

    return act


def first(content: dict[str, Any], **values: Any) -> None:
    content["annotations"][0] |= values


SQUARE = [4, 4, 14, 4, 14, 14, 4, 14]
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "image missing": (
        lambda folder: next((folder / "images").glob("1-2.png")).unlink(),
        "image 114 '1-2.png' is not in ",
    ),
    "no image of it": (edit(lambda c: first(c, image_id=4)), "annotation 1 refers to image 4, which does not exist."),
    "image id a text": (
        edit(lambda c: first(c, image_id="a")),
        "annotation 1 refers to image a, which does not exist.",
    ),
    "no category": (
        edit(lambda c: first(c, category_id=4)),
        "annotation 1 refers to category 4, which does not exist.",
    ),
    "box outside": (edit(lambda c: first(c, bbox=[60, 2, 5, 5])), "has a box outside the 48 x 40 pixels of its image."),
    "no box": (edit(lambda c: first(c, bbox=[1, 2, 3])), "has a 'bbox' that is not four numbers: [1, 2, 3]."),
    "box of nothing": (edit(lambda c: first(c, bbox=[1, 2, 3, None])), "has a 'bbox' that is not four numbers"),
    "polygon outside": (
        edit(lambda c: first(c, segmentation=[[x + 50 for x in SQUARE]])),
        "has polygons outside the 48 x 40 pixels of its image.",
    ),
    "odd polygon": (edit(lambda c: first(c, segmentation=[SQUARE[:7]])), "has a polygon of 7 numbers"),
    "short polygon": (edit(lambda c: first(c, segmentation=[SQUARE[:4]])), "has a polygon of 4 numbers"),
    "polygon of text": (edit(lambda c: first(c, segmentation=[["a"] * 6])), "with a value that is not a number."),
    "no mask": (edit(lambda c: first(c, segmentation=[])), "has no 'segmentation', although other objects have"),
    "odd mask": (edit(lambda c: first(c, segmentation="x")), "that is neither polygons nor run lengths."),
    "run lengths of another size": (
        edit(lambda c: first(c, segmentation={"size": [4, 4], "counts": [16]})),
        "has run lengths of size [4, 4], but its image has [40, 48].",
    ),
    "run lengths too short": (
        edit(lambda c: first(c, segmentation={"size": [40, 48], "counts": [16]})),
        "has run lengths that do not add up to the 48 x 40 pixels of its image.",
    ),
    "broken text": (
        edit(lambda c: first(c, segmentation={"size": [40, 48], "counts": "nf\\1<`75M5L3M2O0O1~"})),
        "has run lengths that do not add up",
    ),
    "image twice": (edit(lambda c: c["images"].append(c["images"][3])), "image 121 is listed twice."),
    "wrong size": (
        edit(lambda c: c["images"][3].update(width=40, height=48)),
        "image 121 '1-3.png' is 48 x 40 pixels, but the annotations state 40 x 48.",
    ),
    "image without a name": (edit(lambda c: c["images"][3].pop("file_name")), "image 121 has no 'file_name'."),
    "no number": (edit(lambda c: c["images"][3].pop("id")), "has no integer 'id'."),
    "no object at all": (edit(lambda c: c["annotations"].append(3)), "annotation 3 is not a JSON object."),
}


@pytest.mark.parametrize("name", list(BAD))
def test_open__reports_problems_and_leaves_them_out_with_skip_bad(name: str, root: Path) -> None:
    spoil, expected = BAD[name]
    sound = sources(root)[0]
    spoil(root / "train")
    with pytest.raises(DataError) as caught:
        open_detection(str(root))
    lines = str(caught.value).splitlines()
    assert any(line.startswith(f"{root}/train/instances.json: ") and expected in line for line in lines), lines
    assert lines[-1] == "Correct them, or leave out these images and objects with --skip-bad."

    train = sources(root, skip_bad=True)[0]
    notes = open_detection(str(root), skip_bad=True).notes
    assert any("--skip-bad left out" in note and expected in note for note in notes)
    number = sum(len(train.objects(index).labels) for index in range(len(train)))
    before = sum(len(sound.objects(index).labels) for index in range(len(sound)))
    assert number <= before
    assert before - number <= 3
    assert (number, len(train)) != (before, len(sound)) or name in ("image twice", "no object at all")


FATAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (
        lambda folder: (folder / "instances.json").write_text((folder / "instances.json").read_text()[:200]),
        "is not valid JSON, perhaps truncated: ",
    ),
    "a list": (lambda folder: (folder / "instances.json").write_text("[]"), "holds no JSON object"),
    "no images": (edit(lambda c: c.pop("images")), "has no list 'images'"),
    "not UTF-8": (lambda folder: (folder / "instances.json").write_bytes(b"\xff\xfe{"), "instances.json: "),
    "no category": (edit(lambda c: c.update(categories=[])), "has no category."),
    "category twice": (
        edit(lambda c: c["categories"].append({"id": 3, "name": "x"})),
        "category 3 ('x') has the id or the name",
    ),
}


@pytest.mark.parametrize("name", list(FATAL))
def test_open__refuses_an_unusable_file_with_and_without_skip_bad(name: str, root: Path) -> None:
    FATAL[name][0](root / "val")
    for skip_bad in (False, True):
        with pytest.raises(DataError) as caught:
            open_detection(str(root), skip_bad=skip_bad)
        assert f"{root}/val/instances.json: " in str(caught.value)
        assert FATAL[name][1] in str(caught.value)


def test_open__reports_the_problems_of_all_files_together(root: Path) -> None:
    for split in ("train", "val"):
        for image in (root / split / "images").iterdir():
            image.unlink()
    with pytest.raises(DataError) as caught:
        open_detection(str(root))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"--data '{root}' has 14 problems:"
    assert [line.rpartition("(")[2] for line in lines[1:-1]] == ["9 more like this)", "3 more like this)"]
    assert lines[1].startswith(f"{root}/train/instances.json: image 100 '1-0.png' is not in {root}/train/images")
    with pytest.raises(DataError, match=r"no image of .*/train/instances.json can be used"):
        open_detection(str(root), skip_bad=True)


def test_open__a_category_that_training_lacks(root: Path) -> None:
    content = read_coco(root / "val")
    content["categories"] = [{"id": 1, "name": "disk"}, {"id": 17, "name": "square $x_"}]
    for entry in content["annotations"]:
        entry["category_id"] = 1 if entry["category_id"] == 3 else 17
    discs = sum(entry["category_id"] == 1 for entry in content["annotations"])
    write_coco(root / "val", content)
    with pytest.raises(DataError) as caught:
        open_detection(str(root))
    line = f"val/instances.json: category 1 'disk' ({discs} objects) is missing in {root}/train/instances.json."
    assert f"{line} Did you mean 'disc'?" in str(caught.value)
    _, evaluation = sources(root, skip_bad=True)
    assert {int(label) for index in range(4) for label in evaluation.objects(index).labels} == {2}
    assert len(evaluation.ground_truth(range(4))["annotations"]) == len(content["annotations"]) - discs
    assert evaluation.category_ids == (3, 17, 90)


def test_open__ids_of_the_same_names_may_differ_between_splits(root: Path) -> None:
    content = read_coco(root / "val")
    content["categories"] = [{"id": 90, "name": "disc"}, {"id": 2, "name": "square $x_"}]
    for entry in content["annotations"]:
        entry["category_id"] = {3: 90, 17: 2}[entry["category_id"]]
    write_coco(root / "val", content)
    _, evaluation = sources(root)
    assert evaluation.category_ids == (90, 2, 91)
    truth = evaluation.ground_truth(range(4))
    assert [entry["category_id"] for entry in truth["annotations"]] == [
        entry["category_id"] for entry in content["annotations"]
    ]
    assert {entry["id"]: entry["name"] for entry in truth["categories"]} == {
        90: "disc",
        2: "square $x_",
        91: "never",
    }


def test_open__corrects_objects_and_notes_the_corrections(root: Path) -> None:
    content = read_coco(root / "train")
    objects = content["annotations"]
    objects[0] |= {"bbox": [5, 5, 0, 9]}
    objects[1] |= {"bbox": [-3, 2, 10, 10], "segmentation": [[-3, 2, 7, 2, 7, 12, -3, 12]]}
    box, area = objects[2].pop("bbox"), objects[2].pop("area")
    write_coco(root / "train", content)
    train, _ = sources(root)
    file = root / "train" / "instances.json"
    assert open_detection(str(root)).notes[:2] == (
        f"{file}: 1 object left out: no area.",
        f"{file}: 1 object clipped at the edge of the image.",
    )
    entries = [entry for index in range(len(train)) for entry in train.ground_truth([index])["annotations"]]
    assert len(entries) == len(objects) - 1
    assert (entries[1]["bbox"], entries[1]["area"]) == (box, area)
    index = next(i for i in range(len(train)) if train.image_id(i) == objects[1]["image_id"])
    boxes = train.objects(index).boxes
    assert not len(boxes) or float(boxes.min()) >= 0


def test_open__masks_in_one_split_only(tmp_path: Path) -> None:
    make_split(tmp_path / "train", 4, seed=1)
    make_split(tmp_path / "val", 4, seed=2, masks=False)
    with pytest.raises(DataError, match=r"has no masks, but .* has. Give --no-masks"):
        open_detection(str(tmp_path))
    assert not sources(tmp_path, masks=False)[0].has_masks


def test_open__refuses_other_folders(tmp_path: Path, root: Path) -> None:
    for data, text in (
        ("", "--data is missing"),
        ("nowhere", "is not a folder"),
        (str(root / "train" / "images"), "no training annotation"),
    ):
        with pytest.raises(DataError, match=text):
            open_detection(data)
    (root / "train" / "_annotations.coco.json").write_text("{}")
    with pytest.raises(DataError, match="more than one file of train"):
        open_detection(str(root))


def test_sample__an_image_that_cannot_be_read_or_has_changed(root: Path) -> None:
    train, _ = sources(root)
    Path(train.identify(1)).write_bytes(b"\x89PNG no more")
    Image.new("RGB", (9, 7)).save(train.identify(2))
    with pytest.raises(BadImage):
        train.sample(1)
    with pytest.raises(BadImage, match="9 x 7, not 40 x 52 as in its annotations"):
        train.sample(2)
    # Opening the source ignores an unreadable image, which training skips, and reports an image of another size.
    with pytest.raises(DataError, match=r"has 1 problem:\n.*'1-2.png' is 9 x 7 pixels"):
        open_detection(str(root))


def test_decompress__agrees_with_pycocotools() -> None:
    rng = np.random.default_rng(0)
    for size in ((3, 5), (40, 30), (300, 200)):
        for share in (0.0, 0.02, 0.5, 1.0):
            mask = rng.random(size) < share
            runs = compressed(mask)
            assert decompress(runs["counts"]).tolist() == uncompressed(mask)["counts"]
            decoded = [decode_masks([json.dumps(one).encode()], *size)[0] for one in (runs, uncompressed(mask))]
            assert np.array_equal(decoded[0].numpy(), mask)
            assert np.array_equal(decoded[1].numpy(), mask)
            assert int(coco.area(runs)) == mask.sum()
    for text in ("", "~", "1o", "\x00", "o" * 20 + "1"):
        with pytest.raises(ValueError):
            decompress(text)
