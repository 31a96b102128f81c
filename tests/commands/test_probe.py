"""`pecobook probe`: features are extracted once an image; layer and pooling are chosen without the test images."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pecobook import cli
from pecobook.analysis.features import backbone_features
from pecobook.analysis.position import position_dependence
from pecobook.analysis.probe import linear_probe
from pecobook.commands.extract import extract
from pecobook.commands.probe import probe, probe_features
from pecobook.data.images import open_images
from pecobook.data.stream import read_all
from pecobook.errors import ConfigError, DataError
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.models.weights import load_backbone
from pecobook.utils.images import to_float


def test_extract__returns_the_features_and_labels_of_all_images(images: Path, vit_run: Path) -> None:
    backbone, source = load_backbone(str(vit_run)), open_images(str(images)).train
    features, labels = extract(
        source, 16, 10_000, lambda pixels: backbone_features(backbone, pixels, every_layer=True), "training"
    )
    assert source.labels is not None
    assert labels is not None
    assert len(labels) == len(source)
    pixels, expected_labels, _ = read_all(source, 16)
    expected = backbone_features(backbone, to_float(pixels), every_layer=True)
    assert expected_labels is not None
    assert set(features) == set(expected) == {"block 1 mean", "block 2 mean"}  # masked modelling trains no class token
    for name, value in features.items():
        # The stream reads the images in another order: compare sorted pairs of label and sum of features.
        rows = sorted(zip(labels.tolist(), value.float().sum(1).tolist(), strict=True))
        expected_rows = sorted(zip(expected_labels.tolist(), expected[name].sum(1).tolist(), strict=True))
        assert [row[0] for row in rows] == [row[0] for row in expected_rows]
        assert [row[1] for row in rows] == pytest.approx([row[1] for row in expected_rows], rel=0.02, abs=0.05)


def test_backbone_features__of_every_layer_are_the_outputs_of_the_blocks(vit_run: Path) -> None:
    backbone = load_backbone("timm:test_vit", weights="random", image_size=32)
    network, images = backbone.network.eval(), torch.rand(2, 3, 32, 32)
    outputs: list[Tensor] = []
    for block in network.blocks:  # type: ignore[union-attr]
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.mean, backbone.std))
    with torch.no_grad():
        network((images - mean) / std)
    features = backbone_features(backbone, images, every_layer=True)
    for number, tokens in enumerate(outputs[:2], start=1):
        torch.testing.assert_close(features[f"block {number} class"], tokens[:, 0])
        torch.testing.assert_close(features[f"block {number} mean"], tokens[:, 1:].mean(1))


def test_probe_features__chooses_the_layer_and_pooling_that_predict_the_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, test_labels = torch.arange(400) % 4, torch.arange(100) % 4
    one_hot = torch.eye(4)

    def draw_features(classes: Tensor, strength: float) -> Tensor:
        return strength * one_hot[classes] + torch.randn(len(classes), 4, generator=generator)

    def feature_sets(classes: Tensor) -> dict[str, Tensor]:
        first_bit, second_bit = classes // 2, classes % 2  # the mean holds one bit of the class, the token the other
        return {
            "block 1 mean": draw_features(classes, 0.0),
            "block 2 mean": draw_features(first_bit, 6.0),
            "block 2 class": draw_features(second_bit, 6.0),
            "block 3 mean": draw_features(classes, 1.0),
        }

    train, test = feature_sets(labels), feature_sets(test_labels)
    linear = probe_features(train, test, labels, test_labels, seed=0)["linear"]
    assert linear["features"] == "block 2 mean + class"
    assert set(linear["layers"]) == {*train, "block 2 mean + class"}
    both = [torch.cat([part["block 2 mean"], part["block 2 class"]], 1) for part in (train, test)]
    assert linear["accuracy"] == pytest.approx(linear_probe(both[0], labels, both[1], test_labels).accuracy, abs=1e-3)
    assert linear["accuracy"] > 90


def test_command__prints_the_accuracy_of_every_layer_and_writes_the_results(
    images: Path, vit_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "probe.json"
    cli.main(["probe", "--data", str(images), "--backbone", str(vit_run), "--out", str(out)])
    printed = capsys.readouterr().err
    assert "classes    3 classes: blue 6, green 8, red 8; held out: blue 2, green 0, red 0\n" in printed
    assert f"{vit_run} pools the mean of its patches" in printed
    assert "knn" in printed
    assert "the features are chosen (on about 3 images, too few for any claim):" in printed
    results = json.loads(out.read_text())
    assert list(results["linear"]["layers"]) == ["block 1 mean", "block 2 mean"]
    assert "correct" not in results["linear"]


def test_probe__needs_labels(unlabelled_images: Path, vit_run: Path) -> None:
    with pytest.raises(DataError, match=r"has no labels[^\n]*\nWithout labels, pecobook embed"):
        probe(data=str(unlabelled_images), backbone=str(vit_run))


def test_probe__of_a_file_of_weights_asks_for_its_network(images: Path, vit_run: Path) -> None:
    with pytest.raises(ConfigError, match="a file of weights; also name the network: --backbone timm:NAME --weights"):
        probe(data=str(images), backbone=str(vit_run / "export" / "model.safetensors"))


def test_probe__of_a_tokenizer_reads_its_codewords(
    images: Path, codebook_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = probe(data=str(images), backbone=str(codebook_run))
    assert set(results["linear"]["layers"]) == {"mean codeword", "bag of codes"}
    assert set(results) == {"linear", "knn", "crossed"}
    assert results["crossed"]["features"] == "mean codeword, position removed"
    tokenizer = PerceptualTokenizer.from_pretrained(codebook_run)
    codes = tokenizer.encode(to_float(read_all(open_images(str(images)).evaluation, 16)[0]))
    share, null = (100 * value for value in dataclasses.astuple(position_dependence(codes))[:2])
    line = f"contains {share:.1f}% of the information about its position in the image, permuted codes {null:.1f}%."
    assert line in capsys.readouterr().err
    other_seed = dataclasses.astuple(position_dependence(codes, seed=1))[1]
    probe(data=str(images), backbone=str(codebook_run), seed=1)
    assert f"permuted codes {100 * other_seed:.1f}%." in capsys.readouterr().err
    probing = sys.modules["pecobook.commands.probe"]  # the package has a function of this name
    monkeypatch.setattr(probing, "_EVERY_LAYER", 18)  # of many images a part chooses the features
    rows: list[int] = []
    accuracies = probing.layer_accuracies

    def note(features: dict[str, Tensor], labels: Tensor, *, seed: int) -> dict[str, float]:
        rows.extend(len(values) for values in (*features.values(), labels))
        return accuracies(features, labels, seed=seed)  # type: ignore[no-any-return]

    monkeypatch.setattr(probing, "layer_accuracies", note)
    again = probe(data=str(images), backbone=str(codebook_run))
    assert set(again["linear"]["layers"]) == {"mean codeword", "bag of codes"}
    assert rows == [18, 18, 18]
    assert len(again["crossed"]["correct"]) == 2


def test_probe__of_a_backbone_chooses_the_layer_on_a_part_of_many_images(
    images: Path, vit_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probing = sys.modules["pecobook.commands.probe"]
    monkeypatch.setattr(probing, "_EVERY_LAYER", 18)
    kept: list[tuple[set[str], int]] = []

    def note(*arguments: Any) -> Any:
        features, labels = extract(*arguments)
        kept.append((set(features), len(next(iter(features.values())))))
        return features, labels

    monkeypatch.setattr(probing, "extract", note)
    results = probe(data=str(images), backbone=str(vit_run))
    layers, chosen = set(results["linear"]["layers"]), {results["linear"]["features"]}
    assert layers == {"block 1 mean", "block 2 mean"}
    assert kept == [(layers, 18), (chosen, 22), (chosen, 2)]
