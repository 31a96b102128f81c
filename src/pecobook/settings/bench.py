"""`pecobook bench`: speed."""

from __future__ import annotations

import dataclasses

from pecobook.settings.values import between, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """How fast pre-training runs here."""

    recipe: str = "paper"
    """Recipe of `pecobook pretrain`. On the command line it may stand after `pretrain`, without the flag."""
    data: str = "photos"
    """Images that the data part reads; the other parts work on random ones that are on the device already."""
    tokenizer: str = ""
    """A tokenizer; empty takes the one that goes with the recipe, with random weights, which costs the same."""
    batch_size: int = 0
    """Images on one device; 0 takes 128 on a GPU and 8 on a CPU."""
    precision: str = "auto"
    """fp32, bf16 or fp16; auto is bf16 where the hardware multiplies it natively."""
    compile: bool = False
    """Compile the model with torch.compile."""
    steps: int = 10
    """Steps measured, after as many to warm up on a GPU and one on a CPU."""
    data_steps: int = 4
    """Batches read for the data part; 0 leaves it out."""
    out: str = ""
    """JSON file for the figures; empty only prints them."""

    def __post_init__(self) -> None:
        positive(self, "steps")
        between(self, 0, 1e9, "batch_size", "data_steps")
