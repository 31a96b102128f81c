"""The patch discriminator of equation 8 (Li and Wand, arXiv 1604.04382), for the comparison in Table 7."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.models.group_norm import GroupNorm, convolution_layout
from pecobook.settings.codebook import AdversarialConfig


class PatchDiscriminator(nn.Sequential):
    """Real or reconstructed, patch by patch: float (B, C, H, W) in [-1, 1] to logits (B, 1, H', W').

    Strided 4 x 4 convolutions, leaky rectifiers and GroupNorm, which, other than BatchNorm, makes a batch on many
    devices equal to the same batch on one.

    Args:
        config: width, which each further layer doubles up to eight times; and the number of strided layers: a logit
            sees 16, 34 or 70 pixels with 1, 2 or 3. Images need 3 x 2^num_layers pixels a side.
        in_channels: C.
    """

    def __init__(self, config: AdversarialConfig, in_channels: int = 3) -> None:
        width, num_layers = config.width, config.num_layers
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for level in range(1, num_layers + 1):
            out, stride = width * min(2**level, 8), 2 if level < num_layers else 1
            layers.append(nn.Conv2d(channels, out, 4, stride=stride, padding=1, bias=False))
            layers += [GroupNorm(out, eps=1e-5), nn.LeakyReLU(0.2)]
            channels = out
        super().__init__(*layers, nn.Conv2d(channels, 1, 4, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 1, H', W')."""
        return super().forward(convolution_layout(x))  # type: ignore[no-any-return, no-untyped-call]


def adversarial_losses(discriminator: nn.Module, images: Tensor, restored: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 8 in one pass, for one optimizer: the autoencoder's loss and the discriminator's.

    The discriminator minimises -log D(x) - log(1 - D(x^)). The autoencoder minimises -log D(x^): it has the fixed
    point of equation 8's log(1 - D(x^)), and its gradient does not vanish while the discriminator wins (Goodfellow et
    al., arXiv 1406.2661, section 3).

    Args:
        discriminator: of images in [-1, 1].
        images: float (B, C, H, W) in [0, 1].
        restored: the same, with gradient.

    Returns:
        (), whose gradient reaches `restored` alone, and (), whose gradient reaches the discriminator alone.
    """
    images, restored = images * 2 - 1, restored * 2 - 1
    real, fake = discriminator(torch.cat([images, restored.detach()])).float().chunk(2)
    own = F.softplus(-real).mean() + F.softplus(fake).mean()
    # Parameters without their gradient: what the autoencoder learns from must not teach the discriminator.
    frozen = {name: value.detach() for name, value in discriminator.named_parameters()}
    fooled = torch.func.functional_call(discriminator, frozen, (restored,)).float()
    return F.softplus(-fooled).mean(), own
