"""`pecobook predict --attack.names`: the accuracy of a classifier under attack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pecobook import cli, predict
from pecobook.commands.predict import robustness
from pecobook.errors import ConfigError, DataError
from pecobook.settings.predict import AttackConfig, PredictConfig
from tests.runs import codebook_run, logged, train, vit_run

__all__ = ["codebook_run", "vit_run"]  # the fixtures


@pytest.fixture(scope="module")
def classifier_run(images: Path, vit_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(
        "finetune", images, tmp_path_factory.mktemp("classifier"), backbone=str(vit_run), max_steps="40", eval_crop=0.8
    )


def content(out: Path) -> Any:
    return json.loads((out / "robustness.json").read_text())


def test_predict__measures_attacks(classifier_run: Path, images: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    words = ["predict", str(classifier_run), str(images), "--out", str(out), "--attack.names", "bim", "mi-fgsm"]
    cli.main([*words, "--attack.eps", "60"])
    result = content(out)
    assert set(result["accuracy"]) == {"clean", "bim", "mi-fgsm"}
    assert [path.name for path in out.iterdir() if not path.name.startswith(".")] == ["robustness.json"]
    # Without an attack the accuracy is that of the run's own evaluation, of the same crops.
    top1 = [line["evaluation/top1"] for line in logged(classifier_run) if "evaluation/top1" in line][-1]
    assert result["accuracy"]["clean"] == pytest.approx(top1, abs=1e-2)
    assert result["accuracy"]["bim"] < result["accuracy"]["clean"]
    assert (result["eps"], result["steps"], result["skipped"]) == (60 / 255, 20, 0)
    assert "mi-fgsm" in capsys.readouterr().err


def test_predict__an_attack_without_strength_is_none(classifier_run: Path, images: Path, tmp_path: Path) -> None:
    attacks = {"attack.names": ("bim",), "attack.eps": 0.0, "attack.max_images": 1}
    result = content(predict(str(classifier_run), str(images), out=str(tmp_path / "out"), **attacks))
    assert result["accuracy"]["bim"] == result["accuracy"]["clean"]
    assert result["images"] == 1


def test_attacked_classifier__sees_the_classes_of_the_data_alone(classifier_run: Path) -> None:
    config = PredictConfig(run=str(classifier_run))
    every = robustness.AttackedClassifier(config, ("blue", "green", "red"))
    two = robustness.AttackedClassifier(config, ("red", "blue"))
    pixels = torch.rand(2, 3, 16, 16)
    assert torch.equal(two.logits(pixels), every.logits(pixels)[:, [2, 0]])
    with pytest.raises(ConfigError, match="does not have the class 'pink' of"):
        robustness.AttackedClassifier(config, ("pink", "blue"))


def test_predict__refuses_attacks_of_what_is_no_classifier(
    classifier_run: Path, vit_run: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="is a backbone"):
        predict(str(vit_run), str(images), out=str(out), **{"attack.names": ("bim",)})
    with pytest.raises(DataError, match="no labels"):
        predict(str(classifier_run), str(images / "red"), out=str(out), **{"attack.names": ("bim",)})
    assert not out.exists()


@pytest.mark.parametrize("settings", [{"eps": -1.0}, {"steps": 0}, {"names": ("bim", "bim")}, {"max_images": 0}])
def test_attack_config__refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--"):
        AttackConfig(**settings)
