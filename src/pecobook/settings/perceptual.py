"""The perceptual loss."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pecobook.errors import ConfigError
from pecobook.settings.values import between

Normalisation = Literal["unit-rms", "layernorm", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceptualDistanceConfig:
    """A frozen network and how images are compared in it: what `PerceptualDistance` takes."""

    network: str = ""
    """The perceptual network: timm:NAME, torchvision:NAME, a contrast or pretrain run, or none for pixels alone."""
    weights: str = ""
    """A local file of weights for the network, or random for the control; empty takes the network's own."""
    shuffle: bool = False
    """Permute the entries of each weight tensor of the network: a control that keeps the size of the weights and loses
    what they learned."""
    layers: tuple[int | str, ...] = (3, 6, 9, 12)
    """Layers whose features are compared, from 1: blocks of a transformer, stages of a convolutional network; of
    torchvision's networks also names of nodes, such as features.12."""
    normalisation: Normalisation = "unit-rms"
    """How activations are normalised before they are compared."""
    input_size: int = 0
    """Side to which images are resized for the network, pixels; 0 keeps the images' side (or takes that of a network of
    fixed size)."""
    mean: tuple[float, ...] = ()
    """Mean of the network's input, three numbers for RGB in [0, 1]; empty takes the network's own."""
    std: tuple[float, ...] = ()
    """Standard deviation of the network's input, three numbers for RGB in [0, 1]; empty takes the network's own."""
    bgr: bool = False
    """Give the network its normalised input as BGR, as networks from Caffe want it."""

    def __post_init__(self) -> None:
        between(self, 0, 4096, "input_size")
        if len(self.mean) not in (0, 3) or len(self.std) not in (0, 3) or min(self.std, default=1) <= 0:
            raise ConfigError("--perceptual.mean and --perceptual.std take three numbers each, std above 0.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceptualConfig(PerceptualDistanceConfig):
    """The frozen network whose features the reconstruction must match."""

    weight: float = 1.0
    """Weight of the perceptual loss, lambda in equation 5."""
    warmup: int = 0
    """Steps over which lambda rises from 0 in equal parts. Deep features of a supervised network teach a random decoder
    little, and all latent vectors then shrink to one; a start on pixels alone keeps them apart."""

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0.0, float("inf"), "weight", "warmup")
