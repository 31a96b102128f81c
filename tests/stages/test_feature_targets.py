"""A decoder of features in place of pixels: its loss, what it trains on, and what other commands make of its codes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.testing import assert_close

from pecobook import PerceptualTokenizer, evaluate, load_tokenizer
from pecobook.commands.analyze.masked import open_runs, predict
from pecobook.data.images import open_images
from pecobook.errors import ConfigError, PreflightError, WeightsError
from pecobook.models.feature_target import FeatureTarget
from pecobook.recipes import recipe
from pecobook.settings.codebook import CodebookConfig, TargetConfig
from pecobook.settings.values import replace
from pecobook.stages.codebook import CodebookStage
from tests.runs import SMALL, logged, train

FEATURES: dict[str, Any] = {
    "target_features": "timm:resnet10t",
    "target": {"weights": "random", "layer": "2", "input_size": 32},
}


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train("codebook", images, tmp_path_factory.mktemp("features") / "run", **FEATURES)


def test_loss__is_one_minus_the_mean_cosine() -> None:
    target = FeatureTarget("timm:resnet10t", TargetConfig(weights="random", layer="2"), 32)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    predicted = torch.randn(2, 128, 4, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    assert (target.channels, target.grid) == (128, [4, 4])
    features = target.features(images, (4, 4)).double().numpy()
    ours = predicted.detach().double().numpy()
    cosines = [
        float(a @ b / math.sqrt((a @ a) * (b @ b)))
        for image in range(2)
        for row in range(4)
        for column in range(4)
        for a, b in [(ours[image, :, row, column], features[image, :, row, column])]
    ]
    loss = target.loss(predicted, images)
    assert loss.item() == pytest.approx(1 - float(np.mean(cosines)), abs=1e-5)
    assert float(target.loss(7 * target.features(images, (4, 4)), images)) == pytest.approx(0, abs=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert predicted.grad is not None
    assert predicted.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in target.parameters())
    assert target.features(images, (2, 2)).shape == (2, 128, 2, 2)


def test_last_layer__is_what_the_network_puts_out_of_its_patches() -> None:
    target = FeatureTarget("timm:test_vit", TargetConfig(weights="random"), 160, seed=3)
    images = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    network = timm.create_model("test_vit", num_classes=0)
    state = target.network.network.network.state_dict()  # type: ignore[union-attr]
    assert not network.load_state_dict(state, strict=False).unexpected_keys
    with torch.no_grad():
        tokens = network.eval().forward_features((images - 0.5) / 0.5)[:, network.num_prefix_tokens :]
    expected = tokens.transpose(1, 2).reshape(2, -1, 10, 10)
    assert_close(target.features(images, (10, 10)), expected, rtol=1e-4, atol=1e-5)


def test_stage__loss_is_that_of_the_target_and_of_the_commitment() -> None:
    small = {**SMALL["codebook"], **FEATURES, "quantizer.start_after": 0, "balance": False, "out": "unused"}
    config: CodebookConfig = replace(recipe("codebook", "tiny"), small)
    torch.manual_seed(0)
    stage = CodebookStage(config)
    pixels = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        stage({"image": pixels})  # starts the codebook
        output = stage({"image": pixels})
        images = pixels.float() / 255
        coded = stage.tokenizer.quantizer(stage.tokenizer.encode_latents(images))
        assert stage.target is not None
        loss = stage.target.loss(stage.tokenizer.decoder(coded.quantized), images)
    assert output.loss is not None
    assert_close(output.loss, loss + 0.25 * coded.commitment_loss)
    assert_close(output.metrics["cosine"], 1 - loss)
    assert not {"psnr", "pixel"} & set(output.metrics)
    stage({"image": pixels}).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.tokenizer.encoder[0].parameters())  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"--adversarial.weight 0.4 compares images, but with --target-features"):
        replace(config, {"adversarial.weight": 0.4, "adversarial.num_layers": 1})
    with pytest.raises(ConfigError, match=r"--perceptual.network timm:resnet10t compares images"):
        replace(config, {"perceptual.network": "timm:resnet10t"})
    with pytest.raises(WeightsError, match=r"--target.layer 9: 'timm:resnet10t' has layers 1 to 4"):
        FeatureTarget("timm:resnet10t", dataclasses.replace(config.target, layer="9"), 16)


def test_run__exports_codes_and_features_and_no_images(run: Path) -> None:
    lines = logged(run)
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert -1 <= lines[-1]["evaluation/cosine"] <= 1
    tokenizer = PerceptualTokenizer.from_pretrained(run)
    assert tokenizer.predicts == "features of timm:resnet10t"
    assert json.loads((run / "export" / "config.json").read_text())["features"] == 128
    codes = tokenizer.encode(torch.rand(2, 3, 16, 16))
    assert codes.shape == (2, 4, 4)
    assert tokenizer.features_of(codes).shape == (2, 128, 4, 4)
    with pytest.raises(WeightsError, match=r"predicts features of timm:resnet10t, not pixels.*features_of\(codes\)"):
        tokenizer.decode(codes)
    assert "features of timm:resnet10t, layer 2, by cosine" in (run / "export" / "README.md").read_text()


def test_run__pre_trains_and_is_not_evaluated(run: Path, codebook_run: Path, images: Path, tmp_path: Path) -> None:
    vit = train("pretrain", images, tmp_path / "vit", tokenizer=str(run), max_steps="2")
    assert logged(vit)[-1]["evaluation/accuracy"] >= 0
    assert 0 <= logged(vit)[-1]["evaluation/accuracy_of_position"] <= 100
    masked = predict(open_runs((str(vit),)), open_images(str(images)).evaluation, seed=0)
    assert masked.records[0]["by_share"][0]["accuracy"] >= 0
    assert masked.draw() == {}
    with pytest.raises(
        PreflightError, match="predicts features of timm:resnet10t, not pixels, and cannot be evaluated"
    ):
        evaluate(tokenizers=(str(run),), data=str(images), out=str(tmp_path / "evaluation"), metrics=("psnr",))
    with pytest.raises(WeightsError, match="draws images and predicts no features"):
        load_tokenizer(codebook_run).features_of(torch.zeros(1, 4, 4, dtype=torch.long))
