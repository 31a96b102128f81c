"""Perceptual distance: deep features of a frozen network (PeCo, equation 4).

    d(x, y) = sum over l in S of 1 / (C_l H_l W_l) || f_l(x) - f_l(y) ||^2

f_l are the normalised activations of layer l. The paper does not say which normalisation: `unit-rms` scales every
location's channel vector to unit root mean square (LPIPS's unit norm times sqrt(C), so that the 1/C leaves terms of
order 1), `layernorm` also takes its mean away, `none` leaves the activations.

B batch, H W image side, L layers, C_l H_l W_l shape of layer l's features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.errors import WeightsError
from pecobook.models.weights import load_backbone

Normalisation: TypeAlias = Literal["unit-rms", "layernorm", "none"]


class PerceptualDistance(nn.Module):
    """Distance between images in the features of a frozen network.

    Args:
        network: `timm:NAME`, or a pecobook run (contrast or pretrain).
        layers: 1-based: blocks of a transformer, stages of a convolutional network. The paper's are 3, 6, 9, 12 of a
            ViT-B, and all stages of a ResNet or VGG.
        weights: None for the network's own weights, a local file, or `random` for the control that shows what the
            architecture alone brings.
        normalisation: of the activations, see above.
        input_size: side to which images are resized first; None keeps their size, or takes the network's where it
            works at one size only.
        seed: of random weights.

    Raises:
        WeightsError: unknown network, missing weights, or a layer that the network lacks.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: str,
        layers: Sequence[int] = (3, 6, 9, 12),
        weights: str | None = None,
        *,
        normalisation: Normalisation = "unit-rms",
        input_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = load_backbone(network, weights=weights)
        self.network = backbone.network.eval().requires_grad_(False)
        self.layers, self.normalisation = tuple(layers), normalisation
        self.indices = feature_indices(self.network, self.layers, network)
        is_vit = hasattr(self.network, "blocks") and hasattr(self.network, "patch_embed")
        self.input_size = input_size or (backbone.image_size if is_vit else None)
        self.register_buffer("mean", torch.tensor(backbone.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std)[:, None, None], persistent=False)

    def train(self, mode: bool = True) -> PerceptualDistance:  # noqa: ARG002
        """A frozen network never leaves evaluation mode: its batch statistics must not follow our images."""
        return super().train(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Normalised activations of float (B, 3, H, W) in [0, 1]: L tensors (B, C_l, H_l, W_l)."""
        if self.input_size is not None and images.shape[-2:] != (self.input_size, self.input_size):
            images = F.interpolate(images, (self.input_size,) * 2, mode="bicubic", antialias=True, align_corners=False)
        found = self.network.forward_intermediates(  # type: ignore[operator]
            (images - self.mean) / self.std, indices=self.indices, intermediates_only=True, output_fmt="NCHW"
        )
        return [normalise(feature.float(), self.normalisation) for feature in found]

    def per_layer(self, x: Tensor, y: Tensor) -> Tensor:
        """The terms of equation 4: two float (B, 3, H, W) in [0, 1] to (L, B). Gradients reach both."""
        pairs = zip(self.features(x), self.features(y), strict=True)
        return torch.stack([(a - b).square().mean((1, 2, 3)) for a, b in pairs])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Equation 4: two float (B, 3, H, W) in [0, 1] to (B,)."""
        return self.per_layer(x, y).sum(0)

    def to_target(self, target: Sequence[Tensor], y: Tensor) -> Tensor:
        """Equation 4 against features made before (without gradient): float (B, 3, H, W) in [0, 1] to (B,)."""
        terms = [(a - b).square().mean((1, 2, 3)) for a, b in zip(target, self.features(y), strict=True)]
        return torch.stack(terms).sum(0)


def normalise(feature: Tensor, how: Normalisation) -> Tensor:
    """Normalise each location over its channels: (B, C, H, W) to the same."""
    if how == "none":
        return feature
    if how == "layernorm":
        feature = feature - feature.mean(1, keepdim=True)
    return feature * torch.rsqrt(feature.square().mean(1, keepdim=True) + 1e-6)


def feature_indices(network: nn.Module, layers: Sequence[int], name: str) -> list[int]:
    """Timm's feature indices of 1-based layers. Raises WeightsError for a layer the network lacks."""
    if not hasattr(network, "forward_intermediates"):
        raise WeightsError(f"timm's '{name}' gives no intermediate features: choose another perceptual network.")
    if hasattr(network, "blocks") and hasattr(network, "patch_embed"):
        count, first = len(network.blocks), 0  # type: ignore[arg-type]
    else:
        modules = [str(info["module"]) for info in network.feature_info]  # type: ignore[union-attr]
        # timm counts a ResNet's stem as a feature of its own; the paper's stage 1 comes after it.
        first = 0 if modules[0].startswith(("stages", "layer", "features", "blocks")) else 1
        count = len(modules) - first
    wrong = [layer for layer in layers if not 1 <= layer <= count]
    if wrong or not layers:
        raise WeightsError(f"--perceptual.layers {tuple(layers)}: '{name}' has layers 1 to {count}.")
    return [layer - 1 + first for layer in layers]
