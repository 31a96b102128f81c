from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from pecobook.errors import ConfigError, PreflightError
from pecobook.models.perceptual import PerceptualDistance
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.recipes import recipe
from pecobook.settings.codebook import AdversarialConfig, CodebookConfig, ExplicitConfig
from pecobook.settings.perceptual import PerceptualConfig
from pecobook.settings.tokenizer import AutoencoderConfig, QuantizerConfig
from pecobook.settings.training import OptimConfig
from pecobook.settings.values import replace
from pecobook.stages.codebook import CodebookStage
from tests.runs import SMALL, logged, losses, train, without_norm

NETWORK = PerceptualConfig(network="timm:resnet10t", weights="random", layers=(1, 2), weight=0.7)


def make(**more: object) -> CodebookStage:
    small = {**SMALL["codebook"], "out": "unused", "quantizer.start_after": 0}
    config: CodebookConfig = replace(recipe("codebook", "tiny"), small)
    torch.manual_seed(0)
    return CodebookStage(dataclasses.replace(config, **more), num_classes=3)  # type: ignore[arg-type]


def batch(count: int = 4, size: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {"image": torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)}


def by_hand(stage: CodebookStage, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixel loss, commitment and reconstruction, one vector at a time."""
    z = stage.tokenizer.encoder(images * 2 - 1)
    nearest = z.clone()
    for b in range(z.shape[0]):
        for i in range(z.shape[2]):
            for j in range(z.shape[3]):
                distances = (stage.tokenizer.codebook - z[b, :, i, j]).square().sum(1)
                nearest[b, :, i, j] = stage.tokenizer.codebook[distances.argmin()]
    restored = stage.tokenizer.decoder(nearest)  # about [-1, 1]
    return (restored - (images * 2 - 1)).square().mean(), (z - nearest).square().mean(), (restored + 1) / 2


@pytest.mark.parametrize("network", [PerceptualConfig(network="none"), NETWORK])
def test_forward__loss_is_equation_5(network: PerceptualConfig) -> None:
    stage = make(
        perceptual=network, pixel_weight=0.6, balance=False, quantizer=QuantizerConfig(num_codewords=24, commitment=0.3)
    )
    with torch.no_grad():
        stage(batch())  # starts the codebook
        output = stage(batch())
        images = batch()["image"].float() / 255
        pixel, commitment, restored = by_hand(stage, images)
    expected = 0.6 * pixel + 0.3 * commitment
    if stage.perceptual is not None:
        assert isinstance(stage.perceptual, PerceptualDistance)
        with torch.no_grad():
            pairs = zip(stage.perceptual.features(images), stage.perceptual.features(restored), strict=True)
            perceptual = sum((a - b).square().mean() for a, b in pairs)
        expected = expected + 0.7 * perceptual
        torch.testing.assert_close(output.metrics["perceptual"], perceptual, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.metrics["pixel"], pixel, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.metrics["commitment"], commitment, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(output.loss, expected, rtol=1e-4, atol=1e-6)
    error = (restored.clamp(0, 1) - images).square().mean((1, 2, 3))
    torch.testing.assert_close(output.metrics["psnr"], (10 * torch.log10(1 / error)).mean(), rtol=1e-4, atol=1e-3)
    assert not any(value.requires_grad for value in output.metrics.values())


@pytest.mark.parametrize("network", [PerceptualConfig(network="none"), NETWORK])
def test_forward__balance_weighs_commitment_against_one(network: PerceptualConfig) -> None:
    stage = make(perceptual=network, balance=True, quantizer=QuantizerConfig(num_codewords=24, commitment=0.3))
    plain = make(perceptual=network, balance=False, quantizer=QuantizerConfig(num_codewords=24, commitment=0.0))
    output, reference = stage(batch()), plain(batch())
    assert output.loss.item() == pytest.approx(1 + 0.3 * float(output.metrics["commitment"]), rel=1e-5)
    logged_loss = reference.loss + 0.3 * output.metrics["commitment"]
    torch.testing.assert_close(output.metrics["loss"], logged_loss.detach(), rtol=1e-4, atol=1e-6)
    output.loss.backward()
    reference.loss.backward()
    # The decoder's gradient comes from the reconstruction loss alone: the plain gradient, divided by that loss.
    decoders = stage.tokenizer.decoder, plain.tokenizer.decoder
    for balanced, unbalanced in zip(*(decoder.parameters() for decoder in decoders), strict=True):
        assert balanced.grad is not None
        assert unbalanced.grad is not None
        scale = float(output.metrics["loss"] - 0.3 * output.metrics["commitment"])
        torch.testing.assert_close(balanced.grad * scale, unbalanced.grad, rtol=1e-3, atol=1e-6)


def test_forward__lambda_rises_over_its_warm_up() -> None:
    stage = make(perceptual=dataclasses.replace(NETWORK, weight=0.8, warmup=3), balance=False)

    def perceptual_weight(stage: CodebookStage) -> float:
        output = stage(batch())
        others = output.metrics["pixel"] + 0.25 * output.metrics["commitment"]
        return float((output.loss.detach() - others) / output.metrics["perceptual"])

    weights = []
    for step in range(6):
        weights.append(perceptual_weight(stage))
        stage.after_step(step + 1, 6)
    assert weights == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8], rel=1e-3)
    resumed = make(perceptual=dataclasses.replace(NETWORK, weight=0.8, warmup=3), balance=False)
    resumed.load_state_dict(stage.state_dict())
    assert perceptual_weight(resumed) == pytest.approx(0.8, rel=1e-3)


def test_forward__trains_encoder_and_decoder_and_not_the_network() -> None:
    stage = make(perceptual=NETWORK)
    stage(batch()).loss.backward()
    for part in (stage.tokenizer.encoder, stage.tokenizer.decoder):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part[0].parameters())  # type: ignore[index]
    assert stage.perceptual is not None
    assert all(parameter.grad is None for parameter in stage.perceptual.parameters())
    assert not stage.train().perceptual.training  # type: ignore[union-attr]


def test_forward__pictures_in_evaluation_only() -> None:
    stage = make()
    assert stage(batch()).pictures == {}
    codebook = stage.tokenizer.codebook.clone()
    output = stage.eval()(batch())
    assert set(output.pictures) == {"images", "reconstructions"}
    stage.after_step(1, 2)
    stage.eval()(batch(count=2))
    stage.after_step(2, 2)
    assert torch.equal(output.pictures["images"], batch()["image"].float() / 255)
    assert (
        int(stage.tokenizer.quantizer.num_updates) == 1
    )  # the training batch updated the codebook, the held-out batches did not
    assert not torch.equal(codebook, stage.tokenizer.codebook)


def test_config__image_size_must_fit_the_stride() -> None:
    with pytest.raises(ConfigError, match="--image-size 33 must be a multiple of 16"):
        CodebookConfig(image_size=33)


@pytest.mark.parametrize("perceptual", [PerceptualConfig(network="none"), PerceptualConfig(network="x", weight=0.0)])
def test_config__nothing_to_learn(perceptual: PerceptualConfig) -> None:
    with pytest.raises(ConfigError, match="There is no loss"):
        CodebookConfig(pixel_weight=0.0, perceptual=perceptual)


def test_loss__falls_when_trained_on_one_batch() -> None:
    stage = make()
    optimizer = torch.optim.Adam(stage.tokenizer.parameters(), lr=3e-3)
    flat = {"image": torch.tensor([20, 90, 160, 230], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 16, 16)}
    first = float(stage(flat).metrics["pixel"])
    for step in range(30):
        stage(flat).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        stage.after_step(step + 1, 30)
    assert float(stage(flat).metrics["pixel"]) < 0.6 * first


# --------------------------------------------------------------------------------------- the paper's alternatives


def labelled(count: int = 4) -> dict[str, Tensor]:
    return {**batch(count), "other": batch(count)["image"].flip(3), "label": torch.arange(count) % 3}


def test_adversarial__is_added_to_equation_5_with_its_weight() -> None:
    config = AdversarialConfig(weight=0.4, width=4, num_layers=1)
    plain, stage = make(balance=False), make(balance=False, adversarial=config)
    reference, output = plain(batch()), stage(batch())
    torch.testing.assert_close(output.metrics["pixel"], reference.metrics["pixel"])
    generator = reference.loss.detach() + 0.4 * output.metrics["adversarial"]
    torch.testing.assert_close(output.loss.detach(), generator + output.metrics["discriminator"])
    torch.testing.assert_close(output.metrics["loss"], generator)
    output.loss.backward()
    assert stage.discriminator is not None
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in stage.discriminator.parameters() if p.ndim > 1)
    assert "adversarial" not in stage.eval()(batch()).metrics


def test_adversarial__begins_after_its_start() -> None:
    config = AdversarialConfig(weight=0.4, width=4, num_layers=1, start=2)
    plain, stage = make(balance=False), make(balance=False, adversarial=config)
    for step in range(4):
        reference, output = plain(batch()), stage(batch())
        autoencoder_loss = output.loss.detach() - output.metrics["discriminator"]
        expected = reference.loss.detach() + (0.4 * output.metrics["adversarial"] if step >= 2 else 0.0)
        torch.testing.assert_close(autoencoder_loss, expected)
        for trained in (plain, stage):  # there is no optimizer step, so both keep equal weights
            trained.after_step(step + 1, 4)


def test_adversarial__discriminator_learns_from_its_own_term_alone() -> None:
    config = AdversarialConfig(weight=0.4, width=4, num_layers=1)
    gradients = []
    for weight in (0.4, 40.0):
        stage = make(balance=False, adversarial=dataclasses.replace(config, weight=weight))
        stage(batch()).loss.backward()
        assert stage.discriminator is not None
        gradients.append([p.grad for p in stage.discriminator.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("kind", ["classification", "contrastive"])
def test_explicit__is_added_with_its_weight_and_reaches_the_encoder(kind: Literal["classification"]) -> None:
    explicit = ExplicitConfig(kind=kind, weight=0.7, hidden_dim=8, output_dim=4)
    stage, plain = make(explicit=explicit, balance=False), make(balance=False)
    stage.tokenizer.load_state_dict(plain.tokenizer.state_dict())
    output, reference = stage(labelled()), plain(labelled())
    torch.testing.assert_close(output.loss, reference.loss + 0.7 * output.metrics["explicit"])
    assert 0 <= float(output.metrics["explicit_accuracy"]) <= 100
    output.loss.backward()
    reference.loss.backward()
    changed = [
        not torch.allclose(a.grad, b.grad)  # type: ignore[arg-type]
        for a, b in zip(stage.tokenizer.encoder.parameters(), plain.tokenizer.encoder.parameters(), strict=True)
    ]
    assert any(changed)
    assert "explicit" not in stage.eval()(labelled()).metrics


def test_explicit__contrastive_micro_batches_learn_as_the_whole_batch(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pecobook.models.explicit.mlp", without_norm)
    more: dict[str, Any] = {"explicit.kind": "contrastive", "balance": False, "quantizer.start_after": 4}
    more |= {"optim.eps": 1e-3}
    whole = train("codebook", images, tmp_path / "whole", **more)
    parts = train("codebook", images, tmp_path / "parts", **more, micro_batch_size=2)
    split, full = ([line["explicit"] for line in logged(run) if "explicit" in line] for run in (parts, whole))
    assert len(split) == 8
    assert split == pytest.approx(full, rel=1e-4)  # also in the fifth step, in which k-means starts the codebook


@pytest.mark.parametrize("more", [{"balance": False}, {"balance": True, "quantizer.start_after": 0}])
def test_micro_batches__learn_as_the_whole_batch_from_the_start(
    images: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    more = {"optim.eps": 1e-3, **more}
    whole = logged(train("codebook", images, tmp_path / "whole", **more))
    parts = logged(train("codebook", images, tmp_path / "parts", **more, micro_batch_size=2))
    for name in ("loss", "commitment", "pixel", "perplexity", "grad_norm"):
        split, full = ([line[name] for line in lines if name in line] for lines in (parts, whole))
        assert len(split) == 8
        assert split == pytest.approx(full, rel=1e-3), name


def test_explicit__contrastive_keys_follow_the_encoder() -> None:
    stage = make(explicit=ExplicitConfig(kind="contrastive", momentum=0.5, hidden_dim=8, output_dim=4))
    assert stage.contrast is not None
    before = [p.detach().clone() for p in stage.contrast.momentum_encoder.parameters()]
    with torch.no_grad():
        for parameter in stage.tokenizer.encoder.parameters():
            parameter.add_(1.0)
    stage.after_step(1, 10)
    for copy, old in zip(stage.contrast.momentum_encoder.parameters(), before, strict=True):
        torch.testing.assert_close(copy, old + 0.5)


def test_gradient_codebook__adds_the_middle_term() -> None:
    config = QuantizerConfig(num_codewords=24, commitment=0.25, kind="gradient")
    stage = make(balance=False, quantizer=config)
    output = stage(batch())
    expected = output.metrics["pixel"] + 1.25 * output.metrics["commitment"]
    torch.testing.assert_close(output.loss.detach(), expected)
    output.loss.backward()
    codebook = stage.tokenizer.codebook
    assert codebook.grad is not None
    assert codebook.grad.abs().max() > 0
    groups = stage.parameter_groups(OptimConfig(weight_decay=0.1))
    (group,) = [group for group in groups if any(p is codebook for p in group["params"])]
    assert group["weight_decay"] == 0


def test_grey_images__are_read_as_one_channel() -> None:
    stage = make(model=dataclasses.replace(make().config.model, in_channels=1)).eval()
    output = stage(batch())
    weights = torch.tensor([0.2989, 0.587, 0.114])[:, None, None]
    grey = (batch()["image"].float() / 255 * weights).sum(1, keepdim=True)
    torch.testing.assert_close(output.pictures["images"], grey, rtol=1e-4, atol=1e-4)
    assert output.pictures["reconstructions"].shape == (4, 1, 16, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": AutoencoderConfig(in_channels=4)}, "3 channels or 1"),
        ({"quantizer": QuantizerConfig(kind="gradient"), "strategy": "fsdp"}, "use --strategy ddp"),
        ({"adversarial": AdversarialConfig(weight=1, num_layers=7)}, "too many layers for 224-pixel images"),
    ],
)
def test_config__refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CodebookConfig(**settings)


@pytest.mark.parametrize(
    "more",
    [
        {"adversarial.weight": 0.4, "adversarial.width": 4, "adversarial.num_layers": 1},
        {"explicit.kind": "classification"},
        {"explicit.kind": "contrastive", "explicit.hidden_dim": 8, "explicit.output_dim": 4},
        {"quantizer.kind": "gradient"},
        {"model.kind": "vit", "model.channels": (16, 4), "model.num_heads": 2},
        {"model.in_channels": 1},
    ],
    ids=lambda more: next(iter(more)),
)
def test_train__every_variant_runs_and_exports(more: dict[str, Any], images: Path, tmp_path: Path) -> None:
    run = train("codebook", images, tmp_path / "run", **more)
    tokenizer = PerceptualTokenizer.from_pretrained(run)
    channels = more.get("model.in_channels", 3)
    codes = tokenizer.encode(torch.rand(2, channels, 16, 24))
    assert codes.shape == (2, 4, 6)
    assert tokenizer.decode(codes).shape == (2, channels, 16, 24)
    names = tokenizer.state_dict().keys()
    assert {name.split(".")[0] for name in names} == {
        "encoder",
        "decoder",
        "quantizer",
    }  # no part that only training needs


def test_check__classification_needs_labels(tmp_path: Path, unlabelled_images: Path) -> None:
    with pytest.raises(PreflightError, match="has no labels"):
        train("codebook", unlabelled_images, tmp_path / "run", **{"explicit.kind": "classification"})
    assert not (tmp_path / "run").exists()


def test_check__contrast_needs_two_images(tmp_path: Path, images: Path) -> None:
    more: dict[str, Any] = {"explicit.kind": "contrastive", "micro_batch_size": 1}
    with pytest.raises(PreflightError, match=r"--micro-batch-size: .* at least 2 images"):
        train("codebook", images, tmp_path / "run", **more)
    assert not (tmp_path / "run").exists()


def test_summarise__usage_over_all_held_out_images() -> None:
    stage = make().eval()
    codes = stage(batch()).rows["codes"]
    assert codes.shape == (4, 4, 4)
    metrics = stage.summarise({"codes": torch.tensor([[[0, 1], [2, 3]], [[0, 1], [2, 3]]])}, {})
    null = metrics.pop("position_null")
    assert metrics == pytest.approx({"codes_used": 4, "codes_perplexity": 4.0, "position": 100.0})
    assert 0 <= null < 100  # codes that are permuted within an image do not tell the position


@pytest.mark.slow
def test_compile__changes_nothing_but_rounding(images: Path, tmp_path: Path) -> None:
    network = {"perceptual.network": "timm:resnet10t", "perceptual.weights": "random", "perceptual.layers": (1, 2)}
    plain = train("codebook", images, tmp_path / "plain", **network)
    compiled = train("codebook", images, tmp_path / "compiled", **network, compile=True)
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)
