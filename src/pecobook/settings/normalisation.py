"""Settings of the normalisation of a network's input."""

from __future__ import annotations

import dataclasses
from typing import Any

from pecobook.settings.values import between, positive, refuse


@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalisationConfig:
    """The normalisation of the images that a loaded network reads."""

    mean: tuple[float, ...] = ()
    """Mean of the backbone's input, three numbers for RGB in [0, 1]. Empty takes what the weights were trained with,
    which a line at the start of the run names."""
    std: tuple[float, ...] = ()
    """Standard deviation of the backbone's input, three numbers for RGB in [0, 1]; empty as for --mean."""

    def __post_init__(self) -> None:
        check_normalisation(self, "mean", "std")


def check_normalisation(config: Any, mean: str, std: str, *, lowest: float = 0.0, highest: float = 1.0) -> None:
    """Refuse a mean or a standard deviation that is not three numbers in range; `mean` and `std` are field names."""
    between(config, lowest, highest, mean)
    positive(config, std)
    for name in (mean, std):
        if len(getattr(config, name)) not in (0, 3):
            refuse(name, f"takes three numbers, not {len(getattr(config, name))}.")
