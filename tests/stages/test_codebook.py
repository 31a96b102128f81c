from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from pecobook.config import replace
from pecobook.errors import ConfigError
from pecobook.recipes import recipe
from pecobook.stages.codebook import CodebookConfig, CodebookStage, PerceptualConfig, QuantizerConfig, psnr
from tests.runs import SMALL

NETWORK = PerceptualConfig(network="timm:resnet10t", weights="random", layers=(1, 2), weight=0.7)


def make(**more: object) -> CodebookStage:
    small = {**SMALL["codebook"], "out": "unused", "quantizer.start_after": 0}
    config: CodebookConfig = replace(recipe("codebook", "tiny"), small)
    torch.manual_seed(0)
    return CodebookStage(dataclasses.replace(config, **more))  # type: ignore[arg-type]


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
    shown = reference.loss + 0.3 * output.metrics["commitment"]
    torch.testing.assert_close(output.metrics["loss"], shown.detach(), rtol=1e-4, atol=1e-6)
    output.loss.backward()
    reference.loss.backward()
    # The decoder hears of the reconstruction alone: its gradient is the plain one, divided by the reconstruction loss.
    for ours, theirs in zip(stage.tokenizer.decoder.parameters(), plain.tokenizer.decoder.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        scale = float(output.metrics["loss"] - 0.3 * output.metrics["commitment"])
        torch.testing.assert_close(ours.grad * scale, theirs.grad, rtol=1e-3, atol=1e-6)


def test_forward__trains_encoder_and_decoder_and_not_the_network() -> None:
    stage = make(perceptual=NETWORK)
    stage(batch()).loss.backward()
    for part in (stage.tokenizer.encoder, stage.tokenizer.decoder):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part[0].parameters())
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
    assert int(stage.tokenizer.quantizer.num_updates) == 1  # the training batch moved it, the held-out ones did not
    assert not torch.equal(codebook, stage.tokenizer.codebook)


def test_health__perplexity_of_known_usage() -> None:
    stage = make()
    quantizer = stage.tokenizer.quantizer
    quantizer.ema_count.zero_()
    quantizer.ema_count[:8] = 5.0
    quantizer.idle[:3] = 1000
    health = stage.health()
    assert float(health["perplexity"]) == pytest.approx(8.0, rel=1e-4)
    assert float(health["codes_alive"]) == 24 - 3


def test_warning__when_the_codebook_collapses() -> None:
    stage = make()
    said = stage.warning({"perplexity": 1.0}, 200)
    assert said is not None
    assert "of 24 codewords it uses about 1" in said
    assert stage.warning({"perplexity": 1.0}, 199) is None
    assert stage.warning({"perplexity": 12.0}, 200) is None


def test_psnr__by_its_formula() -> None:
    images = torch.zeros(2, 3, 4, 4)
    restored = torch.stack([torch.full((3, 4, 4), 0.1), torch.full((3, 4, 4), 0.01)])
    assert float(psnr(images, restored)) == pytest.approx((20 + 40) / 2, rel=1e-4)


def test_config__image_size_must_fit_the_stride() -> None:
    with pytest.raises(ConfigError, match="--image-size 33 must be a multiple of 16"):
        CodebookConfig(image_size=33)


@pytest.mark.parametrize("perceptual", [PerceptualConfig(network="none"), PerceptualConfig(network="x", weight=0.0)])
def test_config__nothing_to_learn(perceptual: PerceptualConfig) -> None:
    with pytest.raises(ConfigError, match="nothing to learn"):
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
