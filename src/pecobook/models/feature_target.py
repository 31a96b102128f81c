"""Features of a frozen network as the target of a tokenizer's decoder (BEiT v2, arXiv 2208.06366, equation 3).

    loss = 1 - mean over positions of cos(o, t)

o is the decoder's prediction at a position of the latent grid, and t the network's feature there, whose length does not
matter. BEiT v2 maximises the sum of the cosines, which differs only by the number of positions.

B batch, F channels, h w latent grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.errors import ConfigError, WeightsError
from pecobook.models.perceptual import PerceptualDistance
from pecobook.settings.codebook import TargetConfig
from pecobook.utils.vectors import unit_length

_FLAGS = {"--perceptual.layers": "--target.layer", "--perceptual.network": "--target-features"}


class FeatureTarget(nn.Module):
    """The frozen network, its layer, and the loss.

    Args:
        network: `timm:NAME`, `torchvision:NAME`, or a pecobook run.
        config: layer, weights and input of the network.
        image_size: side of the training images, in pixels.
        seed: seed of random weights.

    Raises:
        WeightsError: the network is unknown, weights are missing, or it cannot read images of this size.
    """

    def __init__(self, network: str, config: TargetConfig, image_size: int, *, seed: int = 0) -> None:
        super().__init__()
        self.name = network
        try:
            self.network = PerceptualDistance(
                network,
                (config.layer,),
                config.weights or None,
                seed=seed,
                input_size=config.input_size,
                normalisation="none",
            )
            ((self.channels, *self.grid),) = self.network.check_image_size(image_size, image_size)
        except (ConfigError, WeightsError) as error:
            raise type(error)(_with_flags(str(error))) from None
        self.notes = tuple(map(_with_flags, self.network.notes))

    def input_notes(self, side: int) -> tuple[str, ...]:
        """Return a line for the user if images of `side` pixels are resized for the network."""
        return tuple(map(_with_flags, self.network.input_notes(side)))

    @torch.no_grad()
    def features(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the features of images float (B, C, H, W) in [0, 1] on the latent grid: (B, F, h, w).

        Features on another grid are resampled to it.
        """
        (features,) = self.network.features(images)
        if features.shape[-2:] != grid:
            features = F.interpolate(features, grid, mode="bilinear", antialias=True, align_corners=False)
        return features

    def loss(self, predicted: Tensor, images: Tensor) -> Tensor:
        """Return 1 minus the mean cosine of predicted features (B, F, h, w) and those of the images, ()."""
        target = self.features(images, (predicted.shape[-2], predicted.shape[-1]))
        cosine = (unit_length(predicted.float()) * F.normalize(target, dim=1)).sum(1)
        return 1 - cosine.mean()


def _with_flags(text: str) -> str:
    for old, new in _FLAGS.items():
        text = text.replace(old, new)
    return text.replace("--perceptual.", "--target.")
