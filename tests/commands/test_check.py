"""`pecobook check`: what it finds in a source, and its exit code."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pecobook import cli
from pecobook.data.dense.mask_files import Pixels
from pecobook.data.dense.segmentation import SegmentationSource
from pecobook.recipes import recipe
from pecobook.settings.values import replace, to_dict
from tests.coco import make_coco, read_coco, write_coco
from tests.shapes import write_shapes


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the exit code and the standard output of `pecobook check`."""
    capsys.readouterr()
    try:
        cli.main(["check", *words])
    except SystemExit as ended:
        return int(ended.code or 0), capsys.readouterr().out
    return 0, capsys.readouterr().out


def report_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return the one JSON object on standard output."""
    code, out = run([*words, "--json"], capsys)
    report: dict[str, Any] = json.loads(out)
    assert code == (0 if report["ok"] else 1)
    assert report["ok"] == (report["problems"] == [])
    return report


def write(path: Path, value: int, size: tuple[int, int] = (6, 5), mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def test_check__finds_nothing_wrong_with_right_images_and_writes_nothing(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out = run(["--data", str(images)], capsys)
    assert code == 0
    assert "images     22 images to train on, 2 held out (held-out 10% of train)\n" in out
    assert "classes    3 classes: blue 6, green 8, red 8; held out: blue 2, green 0, red 0\n" in out
    assert "sizes      48 x 40 pixels; mode RGB\n" in out
    assert out.endswith("Nothing is wrong with these images.\n")
    assert list(tmp_path.iterdir()) == []


def test_check__names_unreadable_images_and_those_that_are_in_both_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = 0
    for split, count in (("train", 12), ("val", 4)):
        for name in ("cat", "dog"):
            for number in range(count):
                value += 3
                write(tmp_path / split / name / f"{number}.png", value)
    train, val = tmp_path / "train", tmp_path / "val"
    (val / "cat" / "1.png").write_bytes((train / "dog" / "7.png").read_bytes())
    (train / "cat" / "5.png").write_bytes((train / "cat" / "4.png").read_bytes())
    (train / "dog" / "3.png").write_bytes(b"\x89PNG but not really")
    os.truncate(val / "dog" / "2.png", 0)
    report = report_of(["finetune", "--data", str(tmp_path)], capsys)
    assert report["train"]["images"] == 24
    assert report["train"]["classes"] == {"cat": 12, "dog": 12}
    assert (report["train"]["unreadable"], report["evaluation"]["unreadable"]) == (1, 1)
    assert (report["repeated_in_train"], report["held_out_in_train"]) == (1, 1)
    unreadable, held_out, leak = report["problems"]
    assert unreadable.splitlines()[0] == "Training images that cannot be read: 1"
    assert str(train / "dog" / "3.png") in unreadable
    assert str(val / "dog" / "2.png") in held_out
    assert leak.splitlines() == [
        "Held-out images with the bytes of a training image, so that scores would be too good: 1 of 8",
        f"{val / 'cat' / '1.png'} is {train / 'dog' / '7.png'}",
    ]


def test_check__names_the_first_twenty_of_many_unreadable_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, angle in (("train", 0), ("val", 90)):
        (tmp_path / split).mkdir()
        Image.linear_gradient("L").rotate(angle).save(tmp_path / split / "good.png")
    for number in range(25):
        (tmp_path / "train" / f"x{number:02d}.png").write_bytes(b"no image")
    (problem,) = report_of(["--data", str(tmp_path)], capsys)["problems"]
    lines = problem.splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("Training images that cannot be read: 25", "... and 5 more", 23)
    assert lines[1] == "not an image, or an unsupported format:"  # once for all images


def test_check__groups_unreadable_images_by_their_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(9):
        write(tmp_path / f"{number}.png", 20 * number)
    for number in range(30):
        (tmp_path / f"x{number:02d}.png").write_bytes(b"")
    (tmp_path / "y.png").write_bytes(b"no image")
    problems = report_of(["--data", str(tmp_path)], capsys)["problems"]
    lines = "\n".join(problems).splitlines()
    assert sum("empty file" in line for line in lines) == len(problems)
    assert f"{tmp_path / 'y.png'}: not an image, or an unsupported format" in lines


def test_check__reads_in_several_processes_what_one_process_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(300):
        write(tmp_path / "train" / f"{number}.png", number % 200)
        write(tmp_path / "val" / f"{number}.png", 255 if number else 7)
    (tmp_path / "train" / "150.png").write_bytes(b"no image")
    reports = [report_of(["--data", str(tmp_path), "--workers", workers], capsys) for workers in ("1", "2")]
    assert reports[0] == reports[1]
    assert (reports[0]["repeated_in_train"], reports[0]["held_out_in_train"]) == (100, 1)


def test_check__names_the_values_of_masks_without_a_class_and_the_classes_without_pixels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_shapes(tmp_path)
    assert report_of(["--data", str(root)], capsys)["ok"]
    for number in range(12):  # values 0, 1, 2, 255 -> 0, 1, 77, 255
        file = root / "train" / "masks" / f"{number}.png"
        mask = np.array(Image.open(file))
        mask[mask == 2] = 77
        Image.fromarray(mask).save(file)
    report = report_of(["--data", str(root)], capsys)
    masks = [np.array(Image.open(root / "train" / "masks" / f"{number}.png")) for number in range(12)]
    counts = {str(value): sum(int((mask == value).sum()) for mask in masks) for value in (0, 1, 77, 255)}
    assert report["task"] == "segment"
    assert report["train"]["mask_values"] == counts
    assert report["train"]["pixels"] == {"ground": counts["0"], "red": counts["1"], "green": 0}
    refused, unknown, empty = report["problems"]
    assert "holds the value 77, but the 3 classes have the values 0 to 2" in refused
    assert "(77 in 12 of 12 masks)" in unknown
    assert empty == "1 of 3 classes have no pixels in training: green"
    assert report_of(["segment", "--data", str(root), "--mask-values", "0", "1", "77"], capsys)["train"]["pixels"] == {
        "ground": counts["0"],
        "red": counts["1"],
        "green": counts["77"],
    }


def test_check__reports_masks_of_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_shapes(tmp_path)
    write(root / "train" / "masks" / "3.png", 1, size=(7, 9))
    refused, unreadable = report_of(["segment", "--data", str(root)], capsys)["problems"]
    assert "3.png is 7 x 9, but its image is 56 x 40" in refused
    assert unreadable.endswith("masks/3.png: is 7 x 9, but its image is 56 x 40")


def test_check__names_masks_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_shapes(tmp_path)
    for name in ("3", "5"):
        (root / "train" / "masks" / f"{name}.png").write_bytes(b"")
    (problem,) = report_of(["segment", "--data", str(root)], capsys)["problems"]
    assert problem.splitlines() == [
        "Training images or masks that cannot be read: 2",
        "not an image:",
        "  train/masks/3.png",
        "  train/masks/5.png",
    ]


def test_check__reads_a_mask_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, read = write_shapes(tmp_path), []
    original = SegmentationSource.read_pixels

    def note(self: SegmentationSource, index: int) -> Pixels:
        read.append(self.identify_mask(index))
        return original(self, index)

    monkeypatch.setattr(SegmentationSource, "read_pixels", note)
    report = report_of(["segment", "--data", str(root)], capsys)
    assert len(read) == len(set(read)) == 16
    masks = [np.array(Image.open(file)) for file in root.glob("val/masks/*.png")]
    assert report["evaluation"]["pixels"]["red"] == sum(int((mask == 1).sum()) for mask in masks)
    assert "held out" in report["summary"]


def test_check__a_single_folder_of_images_without_labels_is_no_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(8):
        write(tmp_path / ("train" if number < 6 else "val") / "photos" / f"{number}.png", 20 * number)
    report = report_of(["--data", str(tmp_path)], capsys)
    assert report["ok"]
    assert "the one class folder 'photos'" in report["summary"]["note"]
    assert not report_of(["finetune", "--data", str(tmp_path)], capsys)["ok"]


def test_check__counts_objects_and_names_classes_without_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_coco(tmp_path)
    report = report_of(["--data", str(root)], capsys)
    content = read_coco(root / "train")
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    kinds = [names[entry["category_id"]] for entry in content["annotations"] if not entry["iscrowd"]]
    assert report["task"] == "detect"
    assert report["train"]["objects"] == {name: kinds.count(name) for name in names.values()}
    assert "1 of 3 classes have no objects in training: never" in report["problems"]


def test_check__reports_a_source_that_cannot_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(["--data", str(tmp_path / "nothing")], capsys)
    assert report["ok"] is False
    assert "does not exist" in report["problems"][0]
    for name in ("cat", "dog"):
        write(tmp_path / "train" / name / "1.png", 1)
        write(tmp_path / "val" / f"{name}s" / "1.png", 2)
    assert (
        "class 'cats' of validation is missing in train" in report_of(["--data", str(tmp_path)], capsys)["problems"][0]
    )


def test_check__reports_labels_that_are_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(20):
        write(tmp_path / ("cat" if number % 2 else "dog") / f"{number}.png", 12 * number)
    assert report_of(["--data", str(tmp_path)], capsys)["ok"]
    write(tmp_path / "stray.png", 255)
    (problem,) = report_of(["--data", str(tmp_path)], capsys)["problems"]
    assert problem.startswith("The labels of train are not used: ")
    assert "stray.png" in problem
    assert report_of(["codebook", "--data", str(tmp_path)], capsys)["ok"]  # labels are not learned from


def test_check__the_words_of_a_name_are_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, folder in enumerate(("damaged", "cut short")):
        for name in ("cat", "dog"):
            for place in range(3):
                write(tmp_path / folder / name / f"{place}.png", 100 * number + 10 * place + ord(name[0]) % 7)
    report = report_of(["--data", str(tmp_path)], capsys)
    assert report["notes"] == ["'cut short', 'damaged': taken for classes, though each of them holds 'cat', 'dog'."]
    assert report["ok"]


def test_check__shows_all_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train/cat/1", "train/dog/2", "train/2", "val/cat/3"):
        write(tmp_path / f"{name}.png", len(name))
    (tmp_path / "train" / "owl").mkdir()
    report = report_of(["--data", str(tmp_path)], capsys)
    assert len(report["notes"]) == 2
    assert report["summary"]["note"].split("\n") == report["notes"]
    _, out = run(["--data", str(tmp_path)], capsys)
    assert [line for line in out.splitlines() if line.startswith("note ")] == [
        f"note       {n}" for n in report["notes"]
    ]


def test_check__compares_members_of_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, first in (("train", 0), ("test", 19)):
        with tarfile.open(tmp_path / f"{split}-000.tar", "w") as tar:
            for number in range(first, first + 20):
                file = write(tmp_path / "one.png", 12 * number % 256)
                tar.add(file, f"{number}.png")
                file.unlink()
    report = report_of(["--data", str(tmp_path)], capsys)
    assert report["train"]["modes"] == {"L": 20}
    assert report["held_out_in_train"] == 1
    assert report["problems"][0].splitlines()[1] == f"{tmp_path}/test-000.tar/19.png is {tmp_path}/train-000.tar/19.png"


def test_check__warns_of_images_that_use_little_of_their_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):  # 12 bits in a container of 16 bits, and of these only dark values
        pixels = np.random.default_rng(number).integers(0, 300, (20, 20)).astype(np.uint16)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    words = ["--data", str(tmp_path), "--value-range", "0", "65535"]
    (problem,) = report_of(words, capsys)["problems"]
    assert problem.startswith(f"Warning: '{tmp_path}' uses less than an eighth of the range")
    report = report_of([*words[:-1], "300"], capsys)
    assert report["summary"]["range"] == "0..300 becomes 0..255 in images with more than 8 bits"
    assert report["ok"]


def test_check__names_images_whose_boxes_do_not_fit_their_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_coco(tmp_path)
    content = read_coco(root / "train")
    entry = next(entry for entry in content["annotations"] if not entry["iscrowd"])
    entry["bbox"] = [0, 0, 3, 3] if entry["bbox"][0] > 6 else [30, 30, 3, 3]
    write_coco(root / "train", content)
    report = report_of(["--data", str(root)], capsys)
    name = next(image["file_name"] for image in content["images"] if image["id"] == entry["image_id"])
    problem = next(problem for problem in report["problems"] if "boxes" in problem)
    count = f"1 of {report['boxes_compared']} boxes do not fit the masks of their objects, in these images:"
    assert problem.splitlines() == [count, str(root / "train" / "images" / name)]
    assert report["boxes_differing"] == 1


def test_check__labels_are_needed_where_the_command_needs_them(
    unlabelled_images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report_of(["codebook", "--data", str(unlabelled_images)], capsys)["ok"]
    assert "has no labels" in report_of(["finetune", "--data", str(unlabelled_images)], capsys)["problems"][0]


def test_check__reads_as_commands_that_do_not_train(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_of(["probe", "--data", str(images), "--max-train", "9", "--backbone", "timm:resnet18"], capsys)
    assert (report["task"], report["ok"]) == ("probe", True)
    write(tmp_path / "a" / "1.png", 1)
    write(tmp_path / "a" / "2.png", 2)
    assert "has no labels" in report_of(["probe", "--data", str(tmp_path / "a")], capsys)["problems"][0]
    for words in (["embed"], ["tokenize", "tiny", "--views", "2"]):
        assert report_of([*words, "--data", str(tmp_path / "a")], capsys)["ok"]


def test_check__says_that_masks_and_annotations_beside_images_are_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(4):
        write(tmp_path / "images" / f"{number}.png", number, mode="RGB")
        write(tmp_path / "masks" / f"task-{number}-annotation-7{number}-tag-car.png", number % 2)
    note = report_of(["--data", str(tmp_path)], capsys)["summary"]["note"]
    assert note == f"4 files look like masks, and are not read: 'pecobook check segment --data {tmp_path}' says why."
    for number in range(4):
        (tmp_path / "masks" / f"task-{number}-annotation-7{number}-tag-car.png").unlink()
        (tmp_path / "images" / f"{number}.txt").write_text("0 .5 .5 .1 .1")
    assert "are not read (YOLO's text files)" in report_of(["--data", str(tmp_path)], capsys)["summary"]["note"]
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "z.json").write_text('{"images": []}')
    assert "x/y/z.json): 'pecobook check detect" in report_of(["--data", str(tmp_path)], capsys)["summary"]["note"]
    assert "note" not in report_of(["pretrain", "--data", str(tmp_path)], capsys)["summary"]


def test_check__takes_a_recipe_and_all_flags_of_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_shapes(tmp_path)
    words = ["segment", "camvid", "--data", str(root), "--backbone", "timm:none", "--optim.lr", "1", "--no-verify"]
    assert report_of(words, capsys)["ok"]
    assert report_of([*words, "--ignore", "2"], capsys)["train"]["pixels"].keys() == {"ground", "red"}


def test_check__takes_the_settings_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_shapes(tmp_path / "data")
    config = replace(recipe("segment", "tiny"), {"data": str(root), "ignore": ("2", "255"), "out": "runs/x"})
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"command": "segment", **to_dict(config)}))
    report = report_of(["--config", str(file)], capsys)
    assert (report["task"], report["data"]) == ("segment", str(root))
    assert report["train"]["pixels"].keys() == {"ground", "red"}
    assert report_of(["--config", str(file), "--ignore", "255"], capsys)["train"]["pixels"].keys() == {
        *("ground", "red", "green")
    }


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--out", "runs/x"], "--out names the contact sheet, a .png file, not 'runs/x'."),
        (["--out", "nowhere/x.png"], "--out 'nowhere/x.png' cannot be written: make the folder 'nowhere' first."),
        (["--optim.lrr", "1"], "Unknown flag '--optim.lrr'."),
        (["segmen"], "segment, detect, tokenize, probe, embed), not 'segmen'. Did you mean 'segment'?"),
        (["analyze", "--data", "photos"], "'check' takes the command that will read the images (contrast, codebook,"),
        (["."], "not '.'. For a path give --data '.'."),
        (["probe", "tiny"], "pecobook check COMMAND tiny ...; 'probe' has no recipes"),
        (["--recipe", "tiny"], "--recipe needs the command that it belongs to"),
        (["segment", "tyny"], "'segment' has no recipe 'tyny'"),
    ],
)
def test_check__refuses_wrong_flags(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", *words])
    assert ended.value.code == 2
    assert text in capsys.readouterr().err
