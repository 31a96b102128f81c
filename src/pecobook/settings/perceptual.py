"""Settings of the perceptual loss."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from pecobook.settings.images import check_normalisation
from pecobook.settings.values import between, different, not_negative, refuse

Normalisation = Literal["unit-rms", "layernorm", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceptualDistanceConfig:
    """The frozen network and the comparison of its features: the settings of `PerceptualDistance`."""

    network: str = ""
    """The perceptual network: timm:NAME, torchvision:NAME, a contrast or pretrain run, or none for pixels alone."""
    weights: str = ""
    """A local file of weights for the network, or random for the control. Empty takes the network's own weights."""
    shuffle: bool = False
    """Permute the entries of each weight tensor of the network: a control that keeps the distribution of the weights
    and destroys what they learned."""
    layers: tuple[int | str, ...] = (3, 6, 9, 12)
    """Layers whose features are compared, counted from 1. Layers are blocks of a transformer or stages of a
    convolutional network; for torchvision's networks also names of nodes, such as features.12."""
    normalisation: Normalisation = "unit-rms"
    """Normalisation of the activations before they are compared."""
    input_size: int = 0
    """Side to which images are resized for the network, pixels; 0 keeps the side of the images, or takes the side that
    the network requires."""
    mean: tuple[float, ...] = ()
    """Mean of the network's input, three numbers for RGB in [0, 1]; empty takes the network's own mean."""
    std: tuple[float, ...] = ()
    """Standard deviation of the network's input, three numbers for RGB in [0, 1]; empty takes the network's own
    standard deviation."""
    bgr: bool = False
    """Give the network its normalised input in the order BGR, which networks from Caffe expect."""

    def __post_init__(self) -> None:
        between(self, 0, 4096, "input_size")
        check_normalisation(self, "mean", "std", lowest=-math.inf, highest=math.inf)


def check_layers(config: object, name: str) -> None:
    """Refuse a field of layers that is empty, names a layer twice, or a number below 1."""
    different(config, name)
    layers = getattr(config, name)
    wrong = [layer for layer in layers if isinstance(layer, int) and layer < 1]
    if wrong or not layers:
        refuse(name, f"takes one or more layers, counted from 1, not {' '.join(map(str, wrong)) or 'none'}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerceptualConfig(PerceptualDistanceConfig):
    """The frozen network whose features the reconstruction must match."""

    weight: float = 1.0
    """Weight of the perceptual loss, lambda in equation 5."""
    warmup: int = 0
    """Number of steps over which lambda rises linearly from 0. A random decoder learns little from deep features of a
    supervised network, and all latent vectors then collapse to one; a start on pixels alone prevents this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self, "layers")
        not_negative(self, "weight", "warmup")
