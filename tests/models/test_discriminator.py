"""Equation 8 against its formula, and who learns from which term."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pecobook.models.discriminator import PatchDiscriminator, adversarial_losses
from pecobook.settings.codebook import AdversarialConfig


def pictures(seed: int, side: int = 32) -> Tensor:
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(seed))


def small() -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(AdversarialConfig(width=8, num_layers=2))


def test_adversarial_losses__are_equation_8() -> None:
    discriminator, images, restored = small(), pictures(0), pictures(1)
    autoencoder_loss, discriminator_loss = adversarial_losses(discriminator, images, restored)
    real, fake = (torch.sigmoid(discriminator(x * 2 - 1).double()) for x in (images, restored))  # D(x), D(x^)
    assert_close(discriminator_loss.double(), -(real.log().mean() + (1 - fake).log().mean()), rtol=1e-5, atol=1e-6)
    assert_close(autoencoder_loss.double(), -fake.log().mean(), rtol=1e-5, atol=1e-6)


def test_adversarial_losses__each_side_learns_from_its_own_term() -> None:
    discriminator, restored = small(), pictures(1).requires_grad_()
    autoencoder_loss, discriminator_loss = adversarial_losses(discriminator, pictures(0), restored)
    parameters = list(discriminator.parameters())
    to_image: Any = torch.autograd.grad(autoencoder_loss, [restored, *parameters], retain_graph=True, allow_unused=True)
    assert to_image[0].abs().max() > 0
    assert all(gradient is None for gradient in to_image[1:])
    to_discriminator: Any = torch.autograd.grad(discriminator_loss, [restored, *parameters], allow_unused=True)
    assert to_discriminator[0] is None
    assert all(gradient.abs().max() > 0 for gradient in to_discriminator[1:])


def test_adversarial_losses__a_step_along_each_gradient_lowers_it() -> None:
    discriminator, images, restored = small(), pictures(0), pictures(1).requires_grad_()
    autoencoder_loss, discriminator_loss = adversarial_losses(discriminator, images, restored)
    (gradient,) = torch.autograd.grad(autoencoder_loss, restored, retain_graph=True)
    discriminator_loss.backward()  # type: ignore[no-untyped-call]
    better, _ = adversarial_losses(discriminator, images, restored.detach() - 0.1 * gradient / gradient.abs().max())
    assert better < autoencoder_loss
    with torch.no_grad():
        for parameter in discriminator.parameters():
            assert parameter.grad is not None
            parameter.sub_(0.01 * parameter.grad)
    assert adversarial_losses(discriminator, images, restored)[1] < discriminator_loss


@pytest.mark.parametrize(("num_layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_discriminator__sees_patches(num_layers: int, field: int) -> None:
    """The field of view, by the gradient of one logit; GroupNorm, which sees everything, taken out."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(AdversarialConfig(width=4, num_layers=num_layers))
    plain = nn.Sequential(*(layer for layer in discriminator if not isinstance(layer, nn.GroupNorm)))
    image = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = plain(image)
    assert discriminator(image).shape == logits.shape
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert image.grad is not None
    seen = image.grad[0].abs().sum(0) > 0
    assert (int(seen.any(0).sum()), int(seen.any(1).sum())) == (field, field)


def test_discriminator__of_other_channels_and_small_images() -> None:
    discriminator = PatchDiscriminator(AdversarialConfig(width=8, num_layers=3), in_channels=1)
    assert discriminator(torch.rand(2, 1, 24, 24)).shape == (2, 1, 1, 1)
