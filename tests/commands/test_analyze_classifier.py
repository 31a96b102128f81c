"""`pecobook analyze --classifier`: what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from pecobook.commands.analyze.classifier import open_classifier
from pecobook.data.images import open_images
from pecobook.errors import ConfigError, DataError, PecobookError
from pecobook.models.export import write_export
from pecobook.settings.analyze import AnalyzeConfig
from tests.runs import train


def test_open_classifier__refuses_other_classes(images: Path, vit_run: Path, tmp_path: Path) -> None:
    splits = open_images(str(images))

    def opened(name: str, weights: str = "") -> None:
        open_classifier(AnalyzeConfig(data=str(images), classifier=name, classifier_weights=weights), splits)

    with pytest.raises(ConfigError, match="is not a finetune run"):
        opened(str(vit_run))
    other = train("finetune", images, tmp_path / "classifier", backbone=str(vit_run))
    settings = json.loads((other / "export" / "config.json").read_text())
    settings["classes"] = ["blue", "green", "yellow"]
    (other / "export" / "config.json.sha256").unlink()
    (other / "export" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="does not have the class 'red'"):
        opened(str(other))
    import timm
    from safetensors.torch import save_file

    network = timm.create_model("resnet10t", num_classes=5)
    save_file(network.state_dict(), tmp_path / "five.safetensors")
    with pytest.raises(PecobookError):
        opened("timm:resnet10t", str(tmp_path / "five.safetensors"))
    bare = Path(tmp_path / "bare")
    bare.mkdir()
    Image.new("RGB", (20, 20)).save(bare / "a.png")
    Image.new("RGB", (20, 20)).save(bare / "b.png")
    with pytest.raises(DataError, match="has no labels"):
        open_classifier(AnalyzeConfig(data=str(bare), classifier="timm:resnet10t"), open_images(str(bare)))
    for name in ("train/a", "train/b", "val"):
        (bare / name).mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(bare / name / "1.png")
    with pytest.raises(DataError, match=r"--classifier needs labels: .* for its held-out images \(validation\)"):
        open_classifier(AnalyzeConfig(data=str(bare), classifier="timm:resnet10t"), open_images(str(bare)))


def test_open_classifier__refuses_a_segmenter(images: Path, tmp_path: Path) -> None:
    pyramid = {"name": "resnet10t", "args": {}, "mean": [0.5] * 3, "std": [0.5] * 3, "image_size": 32, "window": 0}
    segmenter = {
        "kind": "segmenter",
        "pyramid": pyramid,
        "classes": ["blue", "green", "red"],
        "width": 0,
        "image_size": 32,
    }
    write_export(tmp_path, segmenter, {"x": torch.zeros(1)}, "")
    config = AnalyzeConfig(data=str(images), classifier=str(tmp_path))
    with pytest.raises(ConfigError, match="is not a finetune run: it is a segmenter"):
        open_classifier(config, open_images(str(images)))
