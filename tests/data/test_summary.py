"""The lines that say what a run learns from."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pecobook.data.decode import BadImage
from pecobook.data.dense.detection import open_detection
from pecobook.data.dense.segmentation import open_segmentation
from pecobook.data.dense.segmentation_classes import MaskClasses
from pecobook.data.images import open_all_splits, open_images
from pecobook.data.source import Splits
from pecobook.data.summary import Census, Look, aligned, describe, look, pixels_text, sample_census, spread
from tests.coco import make_coco
from tests.runs import squares


def write(path: Path, size: tuple[int, int] = (8, 6), mode: str = "RGB", value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def test_describe__says_what_a_folder_of_classes_holds(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path / "train" / "cat" / f"{number}.png", size=(8, 6))
    write(tmp_path / "train" / "dog" / "0.png", size=(10, 20), mode="L")
    write(tmp_path / "val" / "dog" / "0.png")
    assert aligned(describe(open_images(str(tmp_path)))) == [
        f"data       {tmp_path}",
        "images     6 images to train on, 1 held out (validation)",
        "classes    2 classes: cat 5, dog 1; held out: cat 0, dog 1",
        "sizes      short side 6 to 10, long side 8 to 20 pixels; mode RGB 5, L 1",
    ]


def test_describe__says_that_photos_are_built_in() -> None:
    lines = dict(describe(open_images("photos")))
    assert lines["data"] == "photos, built-in photographs (--data SOURCE takes your own images)"
    assert lines["sizes"].startswith("48 x 48 pixels (")


def test_describe__lists_what_was_left_out_and_the_notes() -> None:
    source = squares(4)
    lines = describe(Splits(source, source, "test", {"extension .xyz": 1200, "link": 3}, ("Labels are missing.",)))
    assert ("left out", "1,203: 1,200 extension .xyz; 3 link") in lines
    assert lines[-1] == ("note", "Labels are missing.")


def test_describe__lists_the_objects_that_were_left_out_of_both_splits(tmp_path: Path) -> None:
    splits = open_detection(str(make_coco(tmp_path)))  # a crowd in each split
    assert dict(describe(splits))["left out"] == "2: 2 crowds (iscrowd 1)"


def test_describe__names_the_unreadable_images_of_the_sample(tmp_path: Path) -> None:
    for number in range(10):
        write(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    every_image = open_all_splits(str(tmp_path))[0]
    splits = Splits(every_image, every_image, "test")
    text = dict(describe(splits))["unreadable"]
    assert text == f"1 of 10, the first: {tmp_path / '3.png'}: not an image, or an unsupported format"


def test_describe__names_masks_that_are_taken_for_a_class(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / "CXR_png" / f"x{number}.png")
        write(tmp_path / "lung masks" / f"x{number}_mask.png", value=number)
    text = "The class 'lung masks' has files of the names of other classes' files: if it holds masks, move it away."
    assert dict(describe(open_images(str(tmp_path))))["note"] == text
    (tmp_path / "lung masks").rename(tmp_path / "lungs")
    assert "note" not in dict(describe(open_images(str(tmp_path))))


def test_describe__counts_the_objects_of_each_class_in_each_split(tmp_path: Path) -> None:
    splits = open_detection(str(make_coco(tmp_path)))
    lines = describe(splits)
    for topic, source in (("objects", splits.train), ("held out", splits.evaluation)):
        labels = [source.objects(i).labels.tolist() for i in range(len(source))]  # type: ignore[attr-defined]
        every = [label for part in labels for label in part]
        counts = {name: every.count(number) for number, name in enumerate(source.classes or (), start=1)}
        start = f"{len(every)} on {sum(map(bool, labels))} of {len(source)} images: {spread(counts)}"
        assert dict(lines)[topic].startswith(start)


def test_describe__measures_the_pixels_of_each_class(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / "images" / f"{number}.png", size=(10, 10))
        mask = np.zeros((10, 10), np.uint8)
        mask[:2] = 1
        mask[9] = 255
        Image.fromarray(mask).save(tmp_path / "images" / ".." / f"{number}.png")
        (tmp_path / "masks").mkdir(exist_ok=True)
        (tmp_path / f"{number}.png").rename(tmp_path / "masks" / f"{number}.png")
    (tmp_path / "classes.txt").write_text("ground\ncar\ntree\n")
    lines = dict(describe(open_segmentation(str(tmp_path))))
    assert lines["classes"] == "3 of masks"
    assert lines["pixels"] == "ground 77.8%, car 22.2%, tree 0.0%; 10.0% of all are ignored"


def test_spread__names_the_rarest_and_the_commonest_of_many_classes() -> None:
    counts = {f"class {number}": count for number, count in enumerate([4, 0, 3, 1200, 5, 0, 7, 8, 9])}
    assert spread(counts) == "from 3 (class 2) to 1,200 (class 3), none of class 1, class 5"
    assert spread(dict.fromkeys(counts, 50)) == "50 each"
    assert spread(dict.fromkeys(counts, 0)) == "none"
    assert spread({"cat": 1, "dog": 0}) == "cat 1, dog 0"


def test_pixels_text__names_the_rarest_and_the_commonest_of_many_classes() -> None:
    classes = MaskClasses(tuple(f"class {number}" for number in range(8)), tuple(range(8)), ignored=(255,))
    text = pixels_text(classes, {0: 1, 2: 9999, 3: 90_000, 255: 100_000})
    absent = "class 1, class 4, class 5 and 2 more"
    assert text == f"from class 0 < 0.1% to class 3 90.0%, none of {absent}; 50.0% of all are ignored"


def test_look__equal_files_have_equal_digests_and_headers_need_no_pixels(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1.png", value=1)
    write(tmp_path / "a" / "2.png", value=2)
    write(tmp_path / "b" / "1.png", value=1)
    data = (tmp_path / "a" / "2.png").read_bytes()
    (tmp_path / "b" / "cut.png").write_bytes(data[:45])
    splits = open_images(str(tmp_path))
    seen = {
        Path(part.identify(i)).relative_to(tmp_path).as_posix(): (look(part, i, whole=True), look(part, i, whole=False))
        for part in (splits.train, splits.evaluation)
        for i in range(len(part))
    }
    assert seen["a/1.png"][0].digest == seen["b/1.png"][0].digest != seen["a/2.png"][0].digest
    assert "cut.png" in str(seen["b/cut.png"][0].problem)
    assert seen["b/cut.png"][1] == Look(str(tmp_path / "b" / "cut.png"), (6, 8), "RGB")


@pytest.mark.parametrize("whole", [False, True])
def test_look__does_not_wait_for_a_named_pipe(tmp_path: Path, whole: bool) -> None:
    write(tmp_path / "1.png")
    os.mkfifo(tmp_path / "2.png")
    (source,) = open_all_splits(str(tmp_path))
    problems = [look(source, i, whole=whole).problem for i in range(len(source))]
    expected = f"{tmp_path / '2.png'}: a named pipe, not a regular file"
    assert [str(problem or "") for problem in problems] == ["", *[expected] * (len(source) - 1)]


def test_census__keeps_few_names_of_unreadable_images() -> None:
    census = Census()
    for number in range(100):
        census.add(Look(str(number), problem=BadImage(str(number), "empty file")))
        census.add(Look(str(number), problem=BadImage(str(number), f"reason {number // 2}")))
    assert (census.images, census.num_bad, len(census.bad)) == (200, 200, 20)
    assert 20 <= len(census.names_of_bad()) <= 40


def test_sample_census__is_bounded_and_spaced_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    source = squares(100_000)

    def note(row: int, _shortest: int) -> Tensor:
        read.append(row)
        return torch.zeros(3, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(source._store, "read", note)
    assert sample_census(source, count=5).images == 5
    assert sorted(read) == [0, 25_000, 50_000, 74_999, 99_999]
    assert sample_census(source, seconds=0).images == 1
