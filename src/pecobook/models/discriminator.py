"""Patch discriminator for equation 8 (Li and Wand, arXiv 1604.04382), for the comparison in Table 7."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.models.group_norm import GroupNorm, convolution_layout
from pecobook.settings.codebook import AdversarialConfig

_GROUP_SIZE = 16  # minimum number of channels that a group of GroupNorm normalises together


class PatchDiscriminator(nn.Sequential):
    """Classifies each patch as real or reconstructed: float (B, C, H, W) in [-1, 1] to logits (B, 1, H', W').

    The network consists of strided 4 x 4 convolutions, leaky ReLUs and GroupNorm. Unlike BatchNorm, GroupNorm gives the
    same result for a batch on many devices as on one.

    Args:
        config: width of the first layer, which each further layer doubles, up to eight times; and number of strided
            layers: the receptive field of a logit is 16, 34 or 70 pixels with 1, 2 or 3. The side of an image must be
            at least 3 x 2^num_layers pixels.
        in_channels: number of image channels C.
    """

    def __init__(self, config: AdversarialConfig, in_channels: int = 3) -> None:
        width, num_layers = config.width, config.num_layers
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for level in range(1, num_layers + 1):
            out, stride = width * min(2**level, 8), 2 if level < num_layers else 1
            layers.append(nn.Conv2d(channels, out, 4, stride=stride, padding=1, bias=False))
            layers += [GroupNorm(out, _GROUP_SIZE, eps=1e-5), nn.LeakyReLU(0.2)]
            channels = out
        super().__init__(*layers, nn.Conv2d(channels, 1, 4, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, 1, H', W')."""
        return super().forward(convolution_layout(x))  # type: ignore[no-any-return, no-untyped-call]


def adversarial_losses(discriminator: nn.Module, images: Tensor, restored: Tensor) -> tuple[Tensor, Tensor]:
    """Compute both losses of equation 8 in one pass, for one optimizer.

    The discriminator minimises -log D(x) - log(1 - D(x^)). The autoencoder minimises -log D(x^): this loss has the same
    fixed point as log(1 - D(x^)) in equation 8, but its gradient does not vanish while the discriminator wins
    (Goodfellow et al., arXiv 1406.2661, section 3).

    Args:
        discriminator: maps images in [-1, 1] to logits.
        images: float (B, C, H, W) in [0, 1].
        restored: reconstructions, float (B, C, H, W) in [0, 1], with gradient.

    Returns:
        loss of the autoencoder, (), whose gradient reaches only `restored`; loss of the discriminator, (), whose
        gradient reaches only the discriminator.
    """
    images, restored = images * 2 - 1, restored * 2 - 1
    real, fake = discriminator(torch.cat([images, restored.detach()])).float().chunk(2)
    discriminator_loss = F.softplus(-real).mean() + F.softplus(fake).mean()
    # Detached parameters: the loss of the autoencoder must not train the discriminator.
    frozen = {name: value.detach() for name, value in discriminator.named_parameters()}
    logits = torch.func.functional_call(discriminator, frozen, (restored,)).float()
    return F.softplus(-logits).mean(), discriminator_loss
