"""`pecobook predict`: files for every image, whatever its name, and for none that cannot be read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pecobook import cli, predict
from pecobook.data.decode import decode
from pecobook.data.segmentation_classes import decode_mask
from pecobook.errors import ConfigError, DataError, RunFolderError, WeightsError
from pecobook.models.segmenter import Segmenter
from pecobook.models.weights import load_backbone
from pecobook.predicting import file_name
from tests.runs import codebook_run, shapes, train, vit_run

__all__ = ["codebook_run", "vit_run"]  # the fixtures


@pytest.fixture(scope="module")
def segment_run(vit_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("segment", shapes(), tmp_path_factory.mktemp("segment"), backbone=str(vit_run), max_steps="4")


@pytest.fixture(scope="module")
def classifier_run(images: Path, vit_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("finetune", images, tmp_path_factory.mktemp("classifier"), backbone=str(vit_run), max_steps="4")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Images of many sizes and modes, one of them broken, two of one name."""
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


def test_segmenter__a_mask_and_a_picture_of_every_image(segment_run: Path, pictures: Path, tmp_path: Path) -> None:
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


def test_segmenter__its_test_can_be_changed(segment_run: Path, pictures: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"test.mode": "slide", "test.flip": True, "test.scales": (0.5, 1.0), "pictures": False}
    out = predict(str(segment_run), str(pictures), out=str(tmp_path / "out"), **settings)
    assert not (out / "pictures").exists()
    assert len(list((out / "masks").rglob("*.png"))) == 4


def test_classifier__the_best_classes_of_every_image(classifier_run: Path, pictures: Path, tmp_path: Path) -> None:
    out = predict(str(classifier_run), str(pictures), out=str(tmp_path / "out"))
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["a.jpg", "a.png", "deep/b.png", "deep/er/odd name (2).png"]
    assert files(out / "pictures") == {f"{stem}.jpg" for stem in STEMS}
    # The same central square, through the exported network.
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
        shares = backbone.network.eval()(((square - mean) / std)[None]).softmax(1)[0]
    best = shares.argsort(descending=True)
    assert [rows[0][name] for name in ("class", "class_2", "class_3")] == [config["classes"][n] for n in best]
    assert float(rows[0]["probability"]) == pytest.approx(float(shares.max()), abs=1e-4)


def test_predict__one_image_and_a_set_with_splits(segment_run: Path, images: Path, tmp_path: Path) -> None:
    out = predict(str(segment_run), str(images / "red" / "3.png"), out=str(tmp_path / "one"), pictures=False)
    assert files(out) == {"masks/3.png", "classes.txt"}
    out = predict(str(segment_run), "photos", out=str(tmp_path / "two"), pictures=False)
    assert len(files(out / "masks")) > 10


def test_predict__refuses(segment_run: Path, vit_run: Path, pictures: Path, tmp_path: Path) -> None:
    run, out = str(segment_run), str(tmp_path / "out")
    with pytest.raises(WeightsError, match="predicts nothing"):
        predict(str(vit_run), str(pictures), out=out)
    with pytest.raises(DataError, match=r"none' does not exist"):
        predict(run, str(tmp_path / "none"), out=out)
    with pytest.raises(ConfigError, match="--out is missing"):
        predict(run, str(pictures), out="")
    assert not Path(out).exists()
    with pytest.raises(RunFolderError, match="not empty"):
        predict(run, str(pictures), out=str(pictures))
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


def test_file_name__is_taken_once() -> None:
    taken: set[str] = set()
    assert [file_name(name, taken) for name in ("a.jpg", "a.png", "a.png", "a.png", "b c", "b:c")] == [
        "a", "a.png", "a.png-2", "a.png-3", "b c", "b:c"
    ]  # fmt: skip
