"""Settings of the colour changes of a view."""

from __future__ import annotations

import dataclasses
import math

from pecobook.settings.values import between


@dataclasses.dataclass(frozen=True, kw_only=True)
class JitterConfig:
    """Strength and probability of changes of brightness and colour; the defaults are MoCo v3's (arXiv 2104.02057)."""

    brightness: float = 0.4
    """Largest relative change of brightness."""
    contrast: float = 0.4
    """Largest relative change of contrast."""
    saturation: float = 0.2
    """Largest relative change of saturation."""
    hue: float = 0.1
    """Largest shift of hue, in turns of the colour circle."""
    jitter: float = 0.8
    """Probability that brightness, contrast, saturation and hue are changed."""
    grey: float = 0.2
    """Probability that the image is turned grey."""

    def __post_init__(self) -> None:
        between(self, 0, math.inf, "brightness", "contrast", "saturation")
        between(self, 0.0, 0.5, "hue")
        between(self, 0.0, 1.0, "jitter", "grey")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhotometricConfig(JitterConfig):
    """Strength and probability of changes of brightness and colour, of blur and of solarisation."""

    blur: float = 0.0
    """Probability of a Gaussian blur."""
    solarise: float = 0.0
    """Probability of solarisation, which inverts the bright half of the values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0.0, 1.0, "blur", "solarise")
