"""Images without content: every place that normalises divides by almost zero there, and its gradient stays bounded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from pecobook.models.contrastive import contrastive_loss, mlp
from pecobook.models.control_quantizers import build_quantizer
from pecobook.models.discriminator import PatchDiscriminator, adversarial_losses
from pecobook.models.feature_target import FeatureTarget
from pecobook.models.masked_vit import patch_pixels
from pecobook.models.perceptual import PerceptualDistance
from pecobook.models.tokenizer import PerceptualTokenizer, build_autoencoder
from pecobook.settings.codebook import AdversarialConfig, TargetConfig
from pecobook.settings.tokenizer import AutoencoderConfig, TokenizerConfig, VectorQuantizerConfig
from pecobook.stages.codebook import small_groups

SIDE = 8


def flat_images() -> Tensor:
    """Black, grey, white, one colour, two halves, one bright pixel: float (6, 3, 8, 8) in [0, 1]."""
    colours = torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0], [0.1, 0.6, 0.8], [0.0] * 3, [0.0] * 3])
    images = colours[:, :, None, None].repeat(1, 1, SIDE, SIDE)
    images[4, :, :, SIDE // 2 :] = 1
    images[5, :, 5, 7] = 1
    return images


def largest(tensors: Iterable[Tensor | None]) -> float:
    """Return the norm of all gradients together; infinite if one of them is not a number."""
    norm = float(torch.cat([tensor.flatten() for tensor in tensors if tensor is not None]).norm())
    return float("inf") if norm != norm else norm


def autoencoder_gradient(config: AutoencoderConfig, dtype: torch.dtype) -> float:
    """Return the largest norm of the gradient of the pixel loss over `flat_images`, with the first weights."""
    torch.manual_seed(0)
    autoencoder = nn.Sequential(*build_autoencoder(config))
    norms = []
    for image in flat_images() * 2 - 1:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            restored = autoencoder(image[None]).float()
        norms.append(largest(torch.autograd.grad(F.mse_loss(restored, image[None]), list(autoencoder.parameters()))))
    return max(norms)


@pytest.mark.parametrize("padding", ["zeros", "reflect", "replicate"])
@pytest.mark.parametrize(
    "shape",
    [
        {"channels": (8, 8, 16)},
        {"channels": (16, 32, 64), "latent_norm": True},
        {"channels": (12, 20, 36)},
        {"channels": (32, 64, 64), "latent_norm": True},
        {"channels": (64, 64, 128), "group_size": 4},  # the groups of the paper's recipes
        {"channels": (128, 32)},
        {"channels": (16, 32), "decoder_width": 0.2},
    ],
    ids=str,
)
def test_autoencoder(shape: dict[str, Any], padding: Any) -> None:
    config = AutoencoderConfig(latent_dim=32, num_blocks=1, padding=padding, **shape)
    for dtype in (torch.float32, torch.bfloat16):
        assert autoencoder_gradient(config, dtype) < 5000  # noise has 1 to 40; infinity becomes not-a-number


@pytest.mark.parametrize("latent_norm", [False, True])
def test_vit_autoencoder(latent_norm: bool) -> None:
    config = AutoencoderConfig(
        kind="vit", channels=(48, 4), num_heads=4, num_blocks=2, latent_dim=32, latent_norm=latent_norm
    )
    for dtype in (torch.float32, torch.bfloat16):
        assert autoencoder_gradient(config, dtype) < 100


def test_autoencoder__has_no_bound_where_each_channel_is_normalised_alone() -> None:
    config = AutoencoderConfig(channels=(16, 32, 64), num_blocks=1, group_size=0, padding="reflect")
    assert autoencoder_gradient(config, torch.float32) > 1e9
    (note,) = small_groups(PerceptualTokenizer(TokenizerConfig(model=config, num_codewords=4)))
    assert "GroupNorm has groups of 1 (channels)" in note
    config = AutoencoderConfig(channels=(16, 32, 64), num_blocks=1, latent_dim=4)
    assert small_groups(PerceptualTokenizer(TokenizerConfig(model=config, num_codewords=4))) == ()


@pytest.mark.parametrize("width", [1, 8, 64])
def test_discriminator(width: int) -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(AdversarialConfig(width=width, num_layers=2))
    images = F.interpolate(flat_images(), 16)
    for dtype in (torch.float32, torch.bfloat16):
        for restored in (images[i : i + 1].clone().requires_grad_() for i in range(len(images))):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                of_autoencoder, of_discriminator = adversarial_losses(discriminator, images[:1], restored)
            assert largest(torch.autograd.grad(of_autoencoder, [restored])) < 10
            assert largest(torch.autograd.grad(of_discriminator, list(discriminator.parameters()))) < 200


@pytest.mark.parametrize("normalisation", ["unit-rms", "layernorm", "none"])
@pytest.mark.parametrize(
    ("network", "layers"),
    [
        ("timm:resnet10t", (1, 4)),
        ("timm:test_vit", (1, 3, 6)),
        ("torchvision:squeezenet1_1", ("features.4", "features.12")),
    ],
)
def test_perceptual_distance(
    network: str, layers: tuple[int | str, ...], normalisation: Literal["unit-rms", "layernorm", "none"]
) -> None:
    size = 32 if network == "timm:test_vit" else 0
    distance = PerceptualDistance(network, layers, "random", normalisation=normalisation, input_size=size)
    images = F.interpolate(flat_images(), 32)
    for dtype in (torch.float32, torch.bfloat16):
        for other in (images.flip(0), images, 0.99 * images + 0.001):
            restored = other.clone().requires_grad_()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = distance(images, restored).sum()
            assert largest(torch.autograd.grad(loss, [restored])) < 100


@pytest.mark.parametrize(
    ("kind", "dim", "settings"),
    [
        ("ema", 8, {}),
        ("ema", 8, {"normalise": True}),
        ("gradient", 8, {"normalise": True}),
        ("fsq", 3, {"levels": (4, 4, 4)}),
        ("lfq", 6, {}),
        ("simvq", 8, {}),
        ("ibq", 8, {}),
    ],
)
@pytest.mark.parametrize("length", [0.0, 1e-20, 1.0])
def test_quantizer__of_a_zero_vector_among_others(kind: Any, dim: int, settings: dict[str, Any], length: float) -> None:
    torch.manual_seed(0)
    quantizer = build_quantizer(VectorQuantizerConfig(kind=kind, num_codewords=64, **settings), dim).train()
    for number in range(2):
        z = torch.randn(2, dim, 3, 3) * (length if number == 0 else 1)
        z[0, :, 0, 0] = 0
        z.requires_grad_()
        out = quantizer(z)
        loss = (out.quantized * torch.randn_like(z)).sum() + out.commitment_loss + out.codebook_loss
        assert largest(torch.autograd.grad(loss, [z])) < 1e5
        quantizer.update()
        assert quantizer.codebook.isfinite().all()


def test_quantizer__normalises_longer_vectors_exactly() -> None:
    torch.manual_seed(0)
    quantizer = build_quantizer(VectorQuantizerConfig(num_codewords=4, normalise=True, revive_after=0), 8).eval()
    z = torch.randn(2, 8, 3, 3)
    out, short = quantizer(z), quantizer(0.01 * z)
    assert torch.equal(short.codes, out.codes)
    assert_close(short.quantized, out.quantized)
    expected = F.mse_loss(F.normalize(z, dim=1), quantizer.lookup(out.codes))
    assert_close(out.commitment_loss, expected)


def test_contrast__of_equal_images() -> None:
    """BatchNorm makes equal images zero, whose direction is arbitrary; its own gradient is that of three norms."""
    torch.manual_seed(0)
    projector, predictor = mlp([16, 32, 16], final_norm=True), mlp([16, 32, 16], final_norm=False)
    features = torch.randn(1, 16).repeat(4, 1).requires_grad_()
    queries = predictor(projector(features))
    loss, _ = contrastive_loss(queries, torch.randn(4, 16), 0.2)
    (of_queries,) = torch.autograd.grad(loss, [queries], retain_graph=True)
    assert largest([of_queries]) < 1000
    assert largest(torch.autograd.grad(loss, [features])) < 1e12
    zero = torch.zeros(4, 16, requires_grad=True)
    assert largest(torch.autograd.grad(contrastive_loss(zero, zero, 0.2)[0], [zero])) < 1000


def test_feature_target__of_a_zero_prediction() -> None:
    target = FeatureTarget("timm:resnet10t", TargetConfig(weights="random", layer="2"), 32)
    predicted = torch.zeros(6, 128, 4, 4, requires_grad=True)
    loss = target.loss(predicted, F.interpolate(flat_images(), 32))
    assert loss.item() == 1
    assert largest(torch.autograd.grad(loss, [predicted])) < 1000


def test_patch_pixels__of_flat_patches_are_zero() -> None:
    assert patch_pixels(flat_images()[:3], 4).abs().max() < 1e-3
    halves = patch_pixels(flat_images()[4:5], SIDE)[0, 0]
    assert halves.abs().max() == pytest.approx(1, abs=0.01)
