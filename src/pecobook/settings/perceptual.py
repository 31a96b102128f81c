"""Settings of the perceptual loss."""

from __future__ import annotations

import math
import shlex
from typing import Any, Literal

from pecobook.errors import ConfigError
from pecobook.settings.images import check_normalisation
from pecobook.settings.values import (
    between,
    coerce,
    different,
    field_name,
    not_negative,
    refuse,
    replace,
    settings_class,
)

Normalisation = Literal["unit-rms", "layernorm", "none"]


@settings_class
class PerceptualDistanceConfig:
    """The frozen network and how its features are compared: the settings of `PerceptualDistance`."""

    network: str = ""
    """The perceptual network: timm:NAME, torchvision:NAME, a contrast or pretrain run, or none for pixels alone."""
    weights: str = ""
    """A local file of weights for the network, or random for the control. If empty, the network's own weights."""
    shuffle: bool = False
    """Permute the entries of each weight tensor of the network: a control that keeps the distribution of the weights
    but destroys what they learned."""
    layers: tuple[int | str, ...] = (3, 6, 9, 12)
    """Layers whose features are compared, counted from 1. Layers are transformer blocks or the stages of a
    convolutional network; torchvision networks also take node names, such as features.12."""
    normalisation: Normalisation = "unit-rms"
    """Normalisation applied to the activations before they are compared."""
    input_size: int = 0
    """Side to which images are resized for the network, in pixels; 0 keeps their size, or uses the size that the
    network requires."""
    mean: tuple[float, ...] = ()
    """Mean of the network's input, three numbers for RGB in [0, 1]. If empty, the network's own mean."""
    std: tuple[float, ...] = ()
    """Standard deviation of the network's input, three numbers for RGB in [0, 1]. If empty, the network's own."""
    bgr: bool = False
    """Pass the normalised input in BGR order, as networks from Caffe expect."""

    def __post_init__(self) -> None:
        between(self, 0, 4096, "input_size")
        check_normalisation(self, "mean", "std", lowest=-math.inf, highest=math.inf)


def check_layers(config: object, name: str) -> None:
    """Refuse a field of layers that is empty, repeats a layer, or has a number below 1."""
    different(config, name)
    layers = getattr(config, name)
    wrong = [layer for layer in layers if isinstance(layer, int) and layer < 1]
    if wrong or not layers:
        refuse(name, f"takes one or more layers, counted from 1, not {' '.join(map(str, wrong)) or 'none'}.")


@settings_class
class PerceptualConfig(PerceptualDistanceConfig):
    """The frozen network whose features the reconstruction must match."""

    weight: float = 1.0
    """Weight of the perceptual loss, lambda in equation 5."""
    also: tuple[str, ...] = ()
    """Further networks, whose distances are added. Each is quoted and has the form NETWORK NAME=VALUE ..., with commas
    between several values: "timm:resnet50 layers=1,2 weight=0.5 input-size=224". The names are those of this group;
    layers and normalisation default to the group's."""
    warmup: int = 0
    """Number of steps over which lambda rises linearly from 0. A random decoder learns little from deep features of a
    supervised network, and all latent vectors then collapse into one; starting with pixels alone prevents this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self, "layers")
        not_negative(self, "weight", "warmup")
        if self.also and self.network == "none":
            refuse("also", "adds to --perceptual.network, which is none: give its first network there.")
        self.networks()

    def networks(self) -> list[tuple[PerceptualDistanceConfig, float]]:
        """Return the settings of every network and its weight relative to lambda. Raises ConfigError."""
        return [(self, 1.0), *(self._further(text) for text in self.also)]

    def _further(self, text: str) -> tuple[PerceptualDistanceConfig, float]:
        try:
            network, *words = shlex.split(text)
            changes = dict(word.split("=", 1) for word in words)
        except ValueError:
            refuse("also", f"takes NETWORK NAME=VALUE ... in quotes, not '{text}'.")
        weight = coerce(changes.pop("weight", 1.0), float, "perceptual.also weight")
        values: dict[str, Any] = {field_name(name): value for name, value in changes.items()}
        for name in {"layers", "mean", "std"} & values.keys():
            values[name] = tuple(values[name].split(","))
        shared = {"network": network, "layers": self.layers, "normalisation": self.normalisation}
        try:
            config = replace(PerceptualDistanceConfig(), shared | values)
            check_layers(config, "layers")
        except ConfigError as error:
            raise ConfigError(f"--perceptual.also '{network}': {error}") from None
        if not (math.isfinite(weight) and weight > 0):
            refuse("also", f"'{network}': weight must be above 0, not {weight:g}.")
        return config, weight
