"""Perceptual distance: deep features of a frozen network (PeCo, equation 4).

    d(x, y) = sum over l in S of 1 / (C_l H_l W_l) || f_l(x) - f_l(y) ||^2

f_l are the normalised activations of layer l. The paper does not specify the normalisation: `unit-rms` scales the
channel vector at every location to unit root mean square (LPIPS's unit norm times sqrt(C), so that the factor 1/C
leaves terms of order 1), `layernorm` subtracts the vector's mean first, `none` leaves the activations unchanged.

B batch, H W image side, L layers, C_l H_l W_l shape of layer l's features.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.models.dry_run import dry_run
from pecobook.models.feature_networks import check_feature_maps, load_feature_network
from pecobook.settings.perceptual import Normalisation, PerceptualConfig, PerceptualDistanceConfig
from pecobook.settings.values import replace
from pecobook.utils.given import given
from pecobook.utils.images import Normalised, as_images


class PerceptualDistance(Normalised):
    """Distance between images in the feature space of a frozen network.

    Args:
        network: `timm:NAME`, `torchvision:NAME`, a pecobook run (contrast, pretrain or finetune), or any module; or one
            object with all settings.
        layers: numbers from 1 (the paper uses 3, 6, 9, 12 of a ViT-B, and all stages of a ResNet or VGG), or node names
            of a torchvision network or a module.
        weights: None for the network's pre-trained weights, a local file, or `random` for the control that isolates the
            contribution of the architecture.
        seed: seed of random weights and of the weight permutation (`shuffle`).
        settings: other fields of `PerceptualDistanceConfig`, by name; None keeps the default.

    Raises:
        WeightsError: the network is unknown, weights are missing, or the network has no such layer.
        ConfigError: a setting is unknown, of the wrong type or out of range.
    """

    def __init__(
        self,
        network: str | nn.Module | PerceptualDistanceConfig,
        layers: Sequence[int | str] | None = None,
        weights: str | None = None,
        *,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        if isinstance(network, PerceptualDistanceConfig):
            config = network
        else:
            config = PerceptualDistanceConfig(network=network if isinstance(network, str) else "")
        changes = {"layers": layers and tuple(layers), "weights": weights, **settings}
        self.config = config = replace(config, {k: v for k, v in changes.items() if v is not None})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            source = network if isinstance(network, nn.Module) else _network_of(config.network)
            weights = config.weights or None
            loaded = load_feature_network(
                source, config.layers, weights, mean=config.mean, std=config.std, input_size=config.input_size
            )
            if config.shuffle:
                shuffle_weights(loaded.network)
        # Convolutions are faster with channels last; for transformers the layout makes no difference.
        self.network = loaded.network.to(memory_format=torch.channels_last)
        self.network.eval().requires_grad_(False)
        self.input_size = config.input_size or loaded.input_size
        self.patch = loaded.patch  # side of a plain transformer's patches, pixels; 0 for other networks
        self.notes = loaded.notes  # lines for the user on what was loaded from where
        self.set_normalisation(loaded.mean, loaded.std)

    def train(self, mode: bool = True) -> PerceptualDistance:  # noqa: ARG002
        """Keep evaluation mode for any `mode`: the batch statistics of the frozen network must not change."""
        return super().train(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the normalised activations of images: float (B, 3, H, W) in [0, 1] to L tensors (B, C_l, H_l, W_l).

        uint8 images are divided by 255. Raises ValueError for any other shape or type.
        """
        images = as_images(images, (1, 3), check=False)
        shape = self._input_shape(*images.shape[-2:])
        if images.shape[-2:] != shape:
            images = F.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False)
        images = self.normalise(images)  # broadcasts grey images (B, 1, H, W) to (B, 3, H, W)
        activations = self.network(images.flip(1) if self.config.bgr else images)
        return [normalise(feature.float(), self.config.normalisation) for feature in activations]

    def check_image_size(self, height: int, width: int) -> list[tuple[int, ...]]:
        """Return the shapes (C_l, H_l, W_l) of the features for images of this size.

        Raises WeightsError if the network cannot read images of this size, or if a layer returns no feature map.
        """
        images = torch.zeros(2, 3, *self._input_shape(height, width), requires_grad=True)
        name = self.config.network or type(self.network).__name__
        purpose = f"read images of {height} x {width} pixels"
        remedy = "Give another --perceptual.input-size, such as 224, or earlier layers."
        features = dry_run(self.network, (images,), network=name, purpose=purpose, remedy=remedy)
        check_feature_maps(features, self.config.layers)
        return [tuple(feature.shape[1:]) for feature in features]

    def input_notes(self, side: int) -> tuple[str, ...]:
        """Return a line for the user if images of `side` pixels are resized for the network."""
        size, _ = self._input_shape(side, side)
        if size == side:
            return ()
        name = self.config.network or type(self.network).__name__
        grid = f", {size // self.patch} x {size // self.patch} patches of {self.patch}" if self.patch else ""
        return (f"{name} reads images resized from {side} to {size} pixels{grid} (--perceptual.input-size).",)

    def _input_shape(self, height: int, width: int) -> tuple[int, int]:
        return (self.input_size, self.input_size) if self.input_size else (height, width)

    def per_layer(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the terms of equation 4: two float (B, 3, H, W) in [0, 1] to (L, B). Gradients flow to both images."""
        return _terms(self.features(x), self.features(y))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance of equation 4: two float (B, 3, H, W) in [0, 1] to (B,)."""
        return self.per_layer(x, y).sum(0)

    def distance_to_features(self, target: Sequence[Any], y: Tensor) -> Tensor:
        """Return the distance of equation 4 between precomputed features and images.

        Args:
            target: result of `features` for the target images, computed without gradients.
            y: float (B, 3, H, W) in [0, 1].

        Returns:
            (B,).
        """
        return _terms(target, self.features(y)).sum(0)


def _terms(target: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Return the terms of equation 4 for two lists of L features, (L, B)."""
    return torch.stack([(a - b).square().mean((1, 2, 3)) for a, b in zip(target, other, strict=True)])


def _network_of(name: str) -> str | nn.Module:
    """Return the name, or a copy of the module that Python code passed under this name."""
    module: nn.Module | None = given("perceptual.network", name)
    return name if module is None else copy.deepcopy(module)


@torch.no_grad()
def shuffle_weights(network: nn.Module) -> None:
    """Permute the entries of each parameter with two or more dimensions in place, using torch's global generator."""
    for parameter in network.parameters():
        if parameter.ndim >= 2:
            flat = parameter.flatten()
            parameter.copy_(flat[torch.randperm(len(flat), device="cpu").to(flat.device)].view_as(parameter))


def normalise(feature: Tensor, how: Normalisation) -> Tensor:
    """Normalise the channel vector at each location: (B, C, H, W) to (B, C, H, W)."""
    if how == "none":
        return feature
    if how == "layernorm":
        feature = feature - feature.mean(1, keepdim=True)
    return feature * torch.rsqrt(feature.square().mean(1, keepdim=True) + 1e-6)


class PerceptualSum(nn.Module):
    """The weighted sum of several networks' distances, with the interface of `PerceptualDistance`.

    Args:
        distances: the distances.
        weights: weight of each.
    """

    def __init__(self, distances: Sequence[PerceptualDistance], weights: Sequence[float]) -> None:
        super().__init__()
        self.distances, self.weights = nn.ModuleList(distances), tuple(weights)
        self.notes = tuple(note for distance in distances for note in distance.notes)

    def features(self, images: Tensor) -> list[list[Tensor]]:
        """Return the normalised activations of images in every network."""
        return [distance.features(images) for distance in self._each]

    def check_image_size(self, height: int, width: int) -> list[tuple[int, ...]]:
        """Return the shapes of the features of all networks, as `PerceptualDistance.check_image_size` does."""
        return [shape for distance in self._each for shape in distance.check_image_size(height, width)]

    def input_notes(self, side: int) -> tuple[str, ...]:
        """Return a line for each network that images of `side` pixels are resized for."""
        return tuple(note for distance in self._each for note in distance.input_notes(side))

    def per_layer(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the weighted terms of all networks: two float (B, 3, H, W) in [0, 1] to (L, B)."""
        pairs = zip(self._each, self.weights, strict=True)
        return torch.cat([weight * distance.per_layer(x, y) for distance, weight in pairs])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the sum of the distances: two float (B, 3, H, W) in [0, 1] to (B,)."""
        return self.per_layer(x, y).sum(0)

    def distance_to_features(self, target: Sequence[Any], y: Tensor) -> Tensor:
        """Return the sum of the distances between precomputed features and images, (B,)."""
        parts = zip(self._each, self.weights, target, strict=True)
        terms = [weight * distance.distance_to_features(features, y) for distance, weight, features in parts]
        return torch.stack(terms).sum(0)

    @property
    def _each(self) -> list[PerceptualDistance]:
        return list(self.distances)  # type: ignore[arg-type]


def build_perceptual_distance(config: PerceptualConfig, seed: int) -> PerceptualDistance | PerceptualSum | None:
    """Build the distance that `config` describes; None if the network is `none` or the weight is 0."""
    if config.network == "none" or config.weight == 0:
        return None
    distances = [PerceptualDistance(network, seed=seed) for network, _ in config.networks()]
    return PerceptualSum(distances, [weight for _, weight in config.networks()]) if config.also else distances[0]
