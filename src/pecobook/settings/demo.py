"""`pecobook demo`: the whole story."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pecobook.settings.values import between, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole story on the built-in photographs or on your images, with a report."""

    data: str = "photos"
    """Images: a folder, a parquet file or folder, tar shards, hf:owner/name, or photos (built in)."""
    out: str = "runs/demo"
    """Folder to write. In the folder of an interrupted demo the demo resumes."""
    seed: int = 0
    """Seed of every run."""
    budget: Literal["auto", "cpu", "gpu"] = "auto"
    """Size of the demo. cpu: 32-pixel images, minutes on 2 cores. gpu: 64-pixel images, larger networks. auto: gpu
    where there is one."""
    length: float = 1.0
    """Factor on the number of steps of every run."""
    max_train: int = 4000
    """Largest number of training images that the probes read."""
    max_test: int = 4000
    """Largest number of held-out images that are measured."""

    def __post_init__(self) -> None:
        positive(self, "length", "max_train", "max_test")
        between(self, 0, 2**31 - 1, "seed")
