"""`pecobook probe`: linear probe and k-NN."""

from __future__ import annotations

import dataclasses

from pecobook.settings.values import positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Linear probe and k-NN of a frozen backbone, or of a tokenizer's codewords."""

    data: str = "photos"
    """Labelled images: a folder of class folders, a parquet file or folder, tar shards, hf:owner/name, or photos."""
    backbone: str = ""
    """A contrast, pretrain or finetune run, or timm:NAME; or a tokenizer, whose codewords are probed: a codebook run,
    dalle:FOLDER, diffusers:FOLDER."""
    weights: str = ""
    """A local file of weights, or random for the floor; empty takes the network's own."""
    out: str = ""
    """JSON file for the figures; empty only prints them."""
    image_size: int = 0
    """Side of the images, pixels; 0 takes the network's."""
    max_train: int = 50_000
    """Most training images; a fixed permutation chooses them."""
    max_test: int = 50_000
    """Most test images."""
    seed: int = 0
    """Of the validation part, and of random weights."""

    def __post_init__(self) -> None:
        positive(self, "max_train", "max_test")
