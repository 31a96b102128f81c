"""`pecobook predict`: files for every image of any name; images that cannot be read are skipped."""

from __future__ import annotations

import csv
import json
import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from pecobook import cli, predict
from pecobook.commands.predict import file_name, writers
from pecobook.commands.predict.sources import list_images
from pecobook.data import stream, views
from pecobook.data.decode import decode
from pecobook.data.source import ImageSource
from pecobook.errors import ConfigError, DataError, RunFolderError, WeightsError
from pecobook.models.dense.segmenter import Segmenter
from pecobook.models.weights import load_backbone
from tests.data.dense.masks import decode_mask
from tests.runs import codebook_run, objects, shapes, train, vit_run

__all__ = ["codebook_run", "vit_run"]  # the fixtures


@pytest.fixture(scope="module")
def segment_run(vit_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("segment", shapes(), tmp_path_factory.mktemp("segment"), backbone=str(vit_run), max_steps="4")


@pytest.fixture(scope="module")
def classifier_run(images: Path, vit_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("finetune", images, tmp_path_factory.mktemp("classifier"), backbone=str(vit_run), max_steps="4")


@pytest.fixture(scope="module")
def detect_run(vit_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("detect", objects(), tmp_path_factory.mktemp("detect"), backbone=str(vit_run), max_steps="2")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Images of many sizes and modes; one is broken, two have the same stem."""
    folder = tmp_path / "pictures"
    (folder / "deep" / "er").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, height, width, mode in (
        ("a.jpg", 40, 56, "RGB"),
        ("a.png", 20, 21, "RGBA"),
        ("deep/b.png", 1, 1, "L"),
        ("deep/er/odd name (2).png", 90, 13, "RGB"),
    ):
        array = rng.integers(0, 256, (height, width, 4), np.uint8)
        Image.fromarray(array, "RGBA").convert(mode).save(folder / name)
    (folder / "broken.png").write_bytes(b"nothing")
    return folder


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


STEMS = ["a", "a.png", "deep/b", "deep/er/odd name (2)"]


def test_segmenter__writes_a_mask_and_a_picture_of_every_image(
    segment_run: Path, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cli.main(["predict", str(segment_run), str(pictures), "--out", str(out)])
    assert files(out) == {
        *(f"masks/{stem}.png" for stem in STEMS),
        *(f"pictures/{stem}.jpg" for stem in STEMS),
        "classes.txt",
        "skipped.txt",
    }
    assert (out / "classes.txt").read_text() == "ground\nred\ngreen\n"
    assert "broken.png" in (out / "skipped.txt").read_text()
    model = Segmenter.from_pretrained(segment_run)
    image = decode((pictures / "deep/er/odd name (2).png").read_bytes())
    mask = decode_mask((out / "masks/deep/er/odd name (2).png").read_bytes(), None, name="mask")
    assert mask.shape == (90, 13)
    assert np.array_equal(mask, model.predict(image).numpy())
    with Image.open(out / "pictures/a.jpg") as picture:
        assert picture.size == (56, 40)


def test_segmenter__takes_test_settings(segment_run: Path, pictures: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"test.mode": "slide", "test.flip": True, "test.scales": (0.5, 1.0), "pictures": False}
    out = predict(str(segment_run), str(pictures), out=str(tmp_path / "out"), **settings)
    assert not (out / "pictures").exists()
    assert len(list((out / "masks").rglob("*.png"))) == 4


def test_classifier__writes_the_best_classes_of_every_image(
    classifier_run: Path, pictures: Path, tmp_path: Path
) -> None:
    out = predict(str(classifier_run), str(pictures), out=str(tmp_path / "out"))
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["a.jpg", "a.png", "deep/b.png", "deep/er/odd name (2).png"]
    assert files(out / "pictures") == {f"{stem}.jpg" for stem in STEMS}
    # The exported network must give the same probabilities for the central square.
    config = json.loads((classifier_run / "export" / "config.json").read_text())
    assert config["crop"] == 1.0
    backbone = load_backbone(str(classifier_run), pool_mean=True)
    backbone.network.reset_classifier(3)  # type: ignore[operator]
    from safetensors.torch import load_file

    backbone.network.load_state_dict(load_file(classifier_run / "export" / "model.safetensors"))
    from pecobook.data.views import center_crop

    square = center_crop(decode((pictures / "a.jpg").read_bytes()), 16).float() / 255
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        probabilities = backbone.network.eval()(((square - mean) / std)[None]).softmax(1)[0]
    best = probabilities.argsort(descending=True)
    assert [rows[0][name] for name in ("class", "class_2", "class_3")] == [config["classes"][n] for n in best]
    assert float(rows[0]["probability"]) == pytest.approx(float(probabilities.max()), abs=1e-4)


def stop_after(monkeypatch: pytest.MonkeyPatch, writer: type[Any], images: int) -> None:
    """Raise RuntimeError after `images` images."""
    original_add, names = writer.add, list[str]()

    def add(self: Any, name: str, file: str, image: Tensor) -> None:
        if len(names) == images:
            raise RuntimeError("stopped")
        names.append(name)
        original_add(self, name, file, image)

    monkeypatch.setattr(writer, "add", add)


@pytest.mark.parametrize("limit", ["_BATCH", "_MAX_BYTES"])
def test_classifier__writes_each_row_at_once(
    limit: str, classifier_run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, limit, 1)
    complete = predict(str(classifier_run), str(pictures), out=str(tmp_path / "complete"), pictures=False)
    lines = (complete / "predictions.csv").read_bytes().splitlines(keepends=True)
    stop_after(monkeypatch, writers.ClassifierWriter, 2)
    monkeypatch.setattr(writers.ClassifierWriter, "finish", lambda _: pytest.fail("as if killed"))
    with pytest.raises(pytest.fail.Exception):
        predict(str(classifier_run), str(pictures), out=str(tmp_path / "out"), pictures=False)
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == b"".join(lines[:3])


def test_a_killed_reading_process_is_told_and_the_predictions_before_it_are_kept(
    classifier_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(260):  # so many images are read by processes, where there are cores
        Image.new("RGB", (9, 9), (number % 256, 0, 0)).save(folder / f"{number:03}.png")
    original, here = ImageSource.read, os.getpid()

    def killed_at_200(source: ImageSource, index: int, shortest: int = 0) -> Tensor:
        if index == 200 and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(source, index, shortest)

    monkeypatch.setattr(ImageSource, "read", killed_at_200)
    monkeypatch.setattr(stream, "default_workers", lambda _devices: 2)
    with pytest.raises(SystemExit) as caught:
        cli.main(["predict", str(classifier_run), str(folder), "--out", str(tmp_path / "out"), "--no-pictures"])
    assert caught.value.code == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.endswith("was killed (SIGKILL), most likely because memory ran out. Free memory, then start again.")
    with (tmp_path / "out" / "predictions.csv").open() as file:
        names = [row["image"] for row in csv.DictReader(file)]
    assert names == [f"{number:03}.png" for number in range(len(names))]
    assert 150 < len(names) <= 200


def test_detector__keeps_detections_after_a_kill_and_after_an_interruption(
    detect_run: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = predict(str(detect_run), str(pictures), out=str(tmp_path / "complete"), pictures=False)
    assert files(complete) == {"detections.json", "images.json", "skipped.txt"}
    expected, listing = (json.loads((complete / name).read_text()) for name in ("detections.json", "images.json"))
    assert [image["id"] for image in listing["images"]] == [1, 2, 3, 4]
    with monkeypatch.context() as patch:
        stop_after(patch, writers.DetectorWriter, 2)
        with pytest.raises(RuntimeError, match="stopped"):
            predict(str(detect_run), str(pictures), out=str(tmp_path / "part"), pictures=False)
    part = json.loads((tmp_path / "part" / "detections.json").read_text())
    assert part == [detection for detection in expected if detection["image_id"] <= 2] != []
    assert json.loads((tmp_path / "part" / "images.json").read_text())["images"] == listing["images"][:2]
    stop_after(monkeypatch, writers.DetectorWriter, 2)
    monkeypatch.setattr(writers.DetectorWriter, "finish", lambda _: pytest.fail("as if killed"))
    with pytest.raises(pytest.fail.Exception):
        predict(str(detect_run), str(pictures), out=str(tmp_path / "killed"), pictures=False)
    assert {"detections.jsonl", "images.jsonl"} <= files(tmp_path / "killed")
    lines = (tmp_path / "killed" / "detections.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == part


def test_predict__takes_one_image_or_a_data_set_with_splits(segment_run: Path, images: Path, tmp_path: Path) -> None:
    out = predict(str(segment_run), str(images / "red" / "3.png"), out=str(tmp_path / "one"), pictures=False)
    assert files(out) == {"masks/3.png", "classes.txt"}
    out = predict(str(segment_run), "photos", out=str(tmp_path / "two"), pictures=False)
    assert len(files(out / "masks")) > 10


def write_parquet(file: Path, sources: list[Path]) -> None:
    table = {"image": [{"bytes": source.read_bytes(), "path": source.name} for source in sources]}
    pq.write_table(pa.table(table), file)


@pytest.mark.parametrize("kind", ["segment", "classifier", "detect"])
def test_odd_files_do_not_end_a_job(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Path = request.getfixturevalue(f"{kind}_run")
    odd, out = tmp_path / "odd", tmp_path / "out"
    odd.mkdir()
    Image.new("RGB", (65_600, 3), "red").save(odd / "wide.png")  # JPEG holds at most 65,535 pixels a side
    Image.new("RGB", (40, 30), "red").save(odd / "whole.png")
    (odd / "zero.png").symlink_to("/dev/zero")
    with (odd / "large.png").open("wb") as sparse:
        sparse.truncate(40 * 10**9)
    predict(str(run), str(odd), out=str(out))
    skipped = (out / "skipped.txt").read_text()
    assert "large.png: 40,000,000,000 bytes are more than" in skipped
    assert "images were skipped" in capsys.readouterr().err
    assert {"pictures/wide.jpg", "pictures/whole.jpg"} <= files(out)
    with Image.open(out / "pictures" / "wide.jpg") as picture:
        assert picture.width == 65_500


def test_an_image_on_which_the_network_fails_is_skipped(
    segment_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, width in (("a.png", 8), ("b.png", 9)):
        Image.new("RGB", (width, 8), "red").save(folder / name)
    predict_one = Segmenter.predict

    def fail_once(self: Segmenter, image: Tensor, *arguments: Any) -> Tensor:
        if image.shape[2] == 8:
            raise torch.OutOfMemoryError("out of memory")
        return predict_one(self, image, *arguments)

    monkeypatch.setattr(Segmenter, "predict", fail_once)
    predict(str(segment_run), str(folder), out=str(tmp_path / "out"))
    assert (tmp_path / "out" / "masks" / "b.png").is_file()
    assert (tmp_path / "out" / "skipped.txt").read_text() == "a.png: cannot be predicted: out of memory\n"


def test_list_images__opens_every_split_and_single_images(images: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for number, split in enumerate(("train", "validation", "test")):
        write_parquet(tmp_path / "set" / f"{split}.parquet", [images / "red" / f"{n}.png" for n in range(number + 1)])
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        tar.add(images / "red" / "0.png", "0.png")
    write_parquet(tmp_path / "one.parquet", [images / "red" / "0.png"])
    for source, count in (("set", 6), ("one.parquet", 1), ("one.tar", 1)):
        sources = list_images(str(tmp_path / source))
        assert sum(len(split) for split, _ in sources) == count
        names = [split.identify(index) for split, _ in sources for index in range(len(split))]
        assert len(set(names)) == count
    write_parquet(tmp_path / "none.parquet", [])
    with pytest.raises(DataError, match=r"none\.parquet'"):
        list_images(str(tmp_path / "none.parquet"))


def test_predict__classifies_large_photographs_as_the_evaluation_does(
    classifier_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pecobook.data.decode.REDUCED_PIXELS", 1000)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (640, 700, 3), np.uint8)  # noise, of which a reduction leaves other values
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "a.jpg")
    shapes_seen: list[tuple[int, ...]] = []
    crop = views.center_crop

    def seen(image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes_seen.append(tuple(image.shape))
        return crop(image, *args, **kwargs)

    monkeypatch.setattr(writers, "center_crop", seen)
    predict(str(classifier_run), str(tmp_path / "in"), out=str(tmp_path / "small"), pictures=False)
    predict(str(classifier_run), str(tmp_path / "in"), out=str(tmp_path / "whole"))
    assert shapes_seen == [(3, 80, 88), (3, 640, 700)]  # at least four times the network's 16 pixels
    with Image.open(tmp_path / "whole" / "pictures" / "a.jpg") as picture:
        assert picture.width == 700


def test_predict__refuses(segment_run: Path, vit_run: Path, pictures: Path, tmp_path: Path) -> None:
    run, out = str(segment_run), str(tmp_path / "out")
    with pytest.raises(WeightsError, match="predicts nothing"):
        predict(str(vit_run), str(pictures), out=out)
    with pytest.raises(DataError, match=r"none' does not exist"):
        predict(run, str(tmp_path / "none"), out=out)
    with pytest.raises(ConfigError, match="--out is missing"):
        predict(run, str(pictures), out="")
    assert not Path(out).exists()
    with pytest.raises(RunFolderError, match="is the folder of images"):
        predict(run, str(pictures), out=str(pictures))
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled" / "a").touch()
    with pytest.raises(RunFolderError, match="not empty"):
        predict(run, str(pictures), out=str(tmp_path / "filled"))
    for file in pictures.rglob("*.*"):
        file.write_bytes(b"broken")
    with pytest.raises(DataError, match="None of the 5 images"):
        predict(run, str(pictures), out=out)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.jpg", "a/b"),
        ("../../etc/passwd.png", "etc/passwd"),
        ("/data/x.png", "data/x"),
        ("x.parquet row 12", "x.parquet row 12"),
        ("a\nb\\c.png", "a_b_c"),
        ("..", "image"),
        ("schön.JPEG", "schön"),
    ],
)
def test_file_name__stays_in_the_folder(name: str, expected: str) -> None:
    assert file_name(name, set()) == expected


def test_file_name__cuts_long_names_and_renames_folders_with_the_name_of_a_file() -> None:
    long = [file_name(f"{'ä' * 120}{end}.jpg", set()) for end in "xy"]
    assert long[0] != long[1]
    assert all(len(name.encode()) <= 230 and name.startswith("ä" * 100) for name in long)
    assert file_name("a.png/b.jpg", {"a"}) == "a_png/b"


def test_file_name__is_used_once() -> None:
    used_names: set[str] = set()
    assert [file_name(name, used_names) for name in ("a.jpg", "a.png", "a.png", "a.png", "b c", "b:c")] == [
        "a", "a.png", "a.png-2", "a.png-3", "b c", "b:c"
    ]  # fmt: skip
