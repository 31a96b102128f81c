"""Settings of `pecobook demo`, which runs all stages once and writes a report."""

from __future__ import annotations

from typing import Literal

from pecobook.settings.images import MAX_LENGTH, ManyRunsConfig
from pecobook.settings.values import LARGEST, between, positive, settings_class


@settings_class
class DemoConfig(ManyRunsConfig):
    """Run all stages on the built-in photographs or on your images, and write a report."""

    out: str = "runs/demo"
    """Folder to write. An interrupted demo in this folder resumes."""
    seed: int = 0
    """Seed of every run."""
    budget: Literal["auto", "cpu", "gpu"] = "auto"
    """Size of the demo. cpu: 32-pixel images, minutes on 2 cores. gpu: 64-pixel images, larger networks. auto: gpu if
    the machine has a GPU, otherwise cpu."""
    length: float = 1.0
    """Factor by which the number of steps of every run is multiplied."""
    max_train: int = 4000
    """Largest number of training images that the probes learn from."""
    max_test: int = 4000
    """Largest number of held-out images. Everything is measured on these images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "max_train", "max_test")
        positive(self, "length", most=MAX_LENGTH)
        between(self, 0, LARGEST, "seed")
