"""Images and their masks are found in the layouts of many data sets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from PIL import Image

from pecobook.data.dense.segmentation import SegmentationSource, open_segmentation
from pecobook.errors import DataError
from tests.shapes import shape, write_pairs, write_shapes

ENDINGS = [
    "_segmentation",
    "_gtFine_labelIds",
    "_L",
    "-mask",
    "_Mask",
    "_mask",
    "_seg",
    "_label",
    "_labels",
    "_gt",
    ".jpg",
    "_lbl",
    "_1stHO",
    "_label_ground-truth",
]


@pytest.mark.parametrize("ending", ENDINGS)
def test_open__masks_with_an_ending(tmp_path: Path, ending: str) -> None:
    root = write_shapes(tmp_path)
    for file in list(root.rglob("masks/*.png")):
        file.rename(file.with_name(f"{file.stem}{ending}.png"))
    splits = open_segmentation(str(root))
    assert (len(splits.train), len(splits.evaluation)) == (12, 4)
    source = cast("SegmentationSource", splits.train)
    assert all(
        source.identify_mask(n).removesuffix(".png").removesuffix(ending)[12:] == source.identify(n)[13:-4]
        for n in range(12)
    )


def test_open__cityscapes(tmp_path: Path) -> None:
    for split, numbers in (("train", range(4)), ("val", range(9, 11))):
        for number in numbers:
            picture, mask = shape(number)
            for kind, ending, array in (
                ("leftImg8bit", "leftImg8bit", picture),
                ("gtFine", "gtFine_labelIds", mask),
                ("gtFine", "gtFine_color", picture),
                ("gtFine", "gtFine_instanceIds", mask.astype(np.uint16)),
            ):
                folder = tmp_path / kind / split / "aachen"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / f"aachen_{number:06}_000019_{ending}.png")
            (folder / f"aachen_{number:06}_000019_gtFine_polygons.json").write_text("{}")
    splits = open_segmentation(str(tmp_path), mask_values=("0-2",))
    train = cast("SegmentationSource", splits.train)
    assert (len(train), len(splits.evaluation), splits.evaluation_name) == (4, 2, "validation")
    assert train.identify(2) == "leftImg8bit/train/aachen/aachen_000002_000019_leftImg8bit.png"
    assert train.identify_mask(2) == "gtFine/train/aachen/aachen_000002_000019_gtFine_labelIds.png"
    assert train.left_out == {"masks of another kind": 12, "extension .json": 6}


def test_open__images_and_masks_in_one_folder(tmp_path: Path) -> None:
    write_pairs(tmp_path / "train", range(6))
    for file in list((tmp_path / "train").rglob("*.*")):
        ending = "_mask" if file.parent.name == "masks" else ""
        file.rename(tmp_path / "train" / f"{file.stem}{ending}{file.suffix}")
    (tmp_path / "train" / "_classes.csv").write_text("Pixel Value, Class\n0, ground\n1, red\n2, green\n")
    splits = open_segmentation(str(tmp_path))
    train = cast("SegmentationSource", splits.train)
    assert train.mask_classes.names == ("ground", "red", "green")
    assert (train.identify(0), train.identify_mask(0)) == ("train/0.jpg", "train/0_mask.png")
    assert len(train) + len(splits.evaluation) == 6


@pytest.mark.parametrize("masks", ["train_masks Validation_masks", "trainannot Validationannot"])  # Carvana, CVAT
def test_open__masks_beside_folders_of_splits(masks: str, tmp_path: Path) -> None:
    for folder, masks_folder, numbers in zip(
        ("train", "Validation"), masks.split(), (range(5), range(5, 8)), strict=True
    ):
        write_pairs(tmp_path, numbers)
        (tmp_path / "images").rename(tmp_path / folder)
        (tmp_path / "masks").rename(tmp_path / masks_folder)
    splits = open_segmentation(str(tmp_path), mask_values=("0-2",))
    train = cast("SegmentationSource", splits.train)
    assert (train.identify(0), train.identify_mask(0)) == ("train/0.jpg", f"{masks.split()[0]}/0.png")
    assert (len(train), len(splits.evaluation), splits.evaluation_name) == (5, 3, "validation")


def test_open__two_masks_of_one_image_are_refused(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    file = root / "train/masks/3.png"
    (root / "train/masks/3_seg.png").write_bytes(file.read_bytes())
    file.rename(root / "train/masks/3_mask.png")
    with pytest.raises(DataError, match=r"train/images/3\.jpg has two masks"):
        open_segmentation(str(root))


def test_open__says_which_files_are_no_masks(tmp_path: Path) -> None:
    write_pairs(tmp_path, range(3))
    for file in list((tmp_path / "masks").iterdir()):
        file.rename(file.with_suffix(".mat"))
    with pytest.raises(DataError, match=r"holds no masks.*\n?.*3 files \.mat"):
        open_segmentation(str(tmp_path))


def test_open__counts_what_is_left_out(tmp_path: Path) -> None:
    root = write_shapes(tmp_path)
    (root / "train/masks/3.png").unlink()
    (root / "val/images/101.jpg").unlink()
    (root / "train/masks/notes.txt").write_text("x")
    Image.new("RGB", (4, 4)).save(root / "cover.png")
    splits = open_segmentation(str(root), skip_bad=True)
    assert cast("SegmentationSource", splits.train).left_out == {
        "images without a mask": 1,
        "masks without an image": 1,
        "pictures in no folder of images or masks": 1,
        "extension .txt": 1,
    }


def test_open__the_lists_of_pascal_voc(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    write_pairs(root, range(8))
    (root / "images").rename(root / "JPEGImages")
    (root / "masks").rename(root / "SegmentationClass")
    for number in (6, 7):  # most images of VOC have no mask
        (root / "SegmentationClass" / f"{number}.png").unlink()
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n2\n4\n")
    (lists / "val.txt").write_text("1\n3\n")
    splits = open_segmentation(str(tmp_path), mask_values=("0-2",))
    train = cast("SegmentationSource", splits.train)
    assert [Path(train.identify(n)).stem for n in range(len(train))] == ["0", "2", "4"]
    assert (len(splits.evaluation), splits.evaluation_name) == (2, "validation")
    assert train.left_out == {"images that ImageSets does not list": 3}
    (root / "SegmentationClass" / "2.png").unlink()
    with pytest.raises(DataError, match=r"JPEGImages/2\.jpg has no mask\nAdd"):
        open_segmentation(str(tmp_path))


# Where data sets keep the image N and its mask.
LAYOUTS = {
    "DeepGlobe": ("{split}/{n}_sat.jpg", "{split}/{n}_mask.png"),
    "one folder called images": ("images/{n}_img.png", "images/{n}_mask.png"),
    "ISIC": ("ISIC_Training_Input/{n}.jpg", "ISIC_Training_GroundTruth/{n}_segmentation.png"),
    "Supervisely": ("ds/img/{n}.jpg", "ds/masks_machine/{n}.png"),
    "chest X-rays": ("CXR_png/{n}.png", "masks/{n}_mask.png"),
    "Mapillary": ("{split}/images/{n}.jpg", "{split}/v2.0/labels/{n}.png"),
    "BDD100K": ("images/10k/{split}/{n}.jpg", "labels/sem_seg/masks/{split}/{n}.png"),
    "nnU-Net": ("imagesTr/{n}_0000.png", "labelsTr/{n}.png"),
    "pets": ("images/{n}.jpg", "annotations/trimaps/{n}.png"),
    "labelme": ("JPEGImages/{n}.jpg", "SegmentationClassPNG/{n}.png"),
    "DRIVE": ("images/{n}_training.tif", "masks/{n}_manual1.png"),
    "words before": ("{split}/images/img_{n}.png", "{split}/masks/lbl_{n}.png"),
    "spaces": ("my images/{n}.jpg", "My Masks/{n} mask.png"),
}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_open__layouts_of_data_sets(name: str, tmp_path: Path) -> None:
    for number in range(6):
        split = "train" if number < 4 else "val"
        for template, array in zip(LAYOUTS[name], shape(number), strict=True):
            file = tmp_path / template.format(n=number, split=split)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(file)
    splits = open_segmentation(str(tmp_path), mask_values=("0-2",))
    train = cast("SegmentationSource", splits.train)
    assert len(train) + len(splits.evaluation) == 6
    assert splits.evaluation_name == ("validation" if "{split}" in LAYOUTS[name][0] else "held-out 10% of train")
    for source in (train, cast("SegmentationSource", splits.evaluation)):
        for number in range(len(source)):
            image, mask = (Path(text(number)).stem for text in (source.identify, source.identify_mask))
            assert re.findall(r"\d", image)[0] == re.findall(r"\d", mask)[0]
            assert source.identify(number) != source.identify_mask(number)


def test_open__names_of_files_that_are_not_unique_pair_nothing(tmp_path: Path) -> None:
    for number, folder in enumerate(("a", "b")):
        picture, mask = shape(number)
        for name, array in ((f"{folder}/0.jpg", picture), (f"masks/{folder}x/0.png", mask)):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / name)
    with pytest.raises(DataError, match="holds no images"):
        open_segmentation(str(tmp_path))
