"""`pecobook reproduce`: the paper's tables."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pecobook.errors import ConfigError
from pecobook.settings.training import BackboneConfig
from pecobook.settings.values import between, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Train what the paper's tables compare, with controls, and print them beside the paper's numbers."""

    tables: tuple[str, ...] = ()
    """Any of tables1-2, table4, table5, table6, table7, table10, table12, v1-table7."""
    data: str = "photos"
    """Images: a folder, a parquet file or folder, tar shards, hf:owner/name, or photos (embedded)."""
    out: str = ""
    """Folder to write. One that was interrupted is gone on with; more tables go into the same."""
    budget: Literal["tiny", "small", "paper"] = "tiny"
    """tiny: 32 pixels, minutes a run on 2 cores. small: five times as long. paper: the paper's recipes."""
    length: float = 1.0
    """Factor on the number of steps of every run."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of every run; each row is trained once for each."""
    transfer: bool = True
    """Also pre-train and fine-tune a ViT on every tokenizer; without, tokenizers alone are measured."""
    backbone: BackboneConfig = BackboneConfig(name="")
    """The ViT that is pre-trained and fine-tuned; without a name the budget's."""
    network: str = ""
    """A perceptual network in place of one that is trained here, as codebook's --perceptual.network."""
    network_layers: tuple[int | str, ...] = (3, 6, 9, 12)
    """Its layers."""
    network_weights: str = ""
    """A local file of its weights; empty takes its own."""
    supervised: str = ""
    """A supervised network for Table 5; empty trains one on the labels of --data, or takes VGG-16 at budget paper."""
    classifier: str = ""
    """Who classifies reconstructions, as analyze's --classifier; empty takes the supervised network trained here."""
    dalle: str = ""
    """Folder of DALL-E's public tokenizer, for its rows."""
    more_data: str = ""
    """More images, for version 1's Table 7."""
    gpus_per_run: int = 0
    """GPUs of each run; runs go side by side on the others. 0: one, at budget paper all of them."""
    micro_batch_size: int = 0
    """As of every training; 0 takes a device's share of the batch whole."""
    compile: bool = False
    """Compile every training."""
    dry_run: bool = False
    """Say what would be trained, and stop."""

    def __post_init__(self) -> None:
        positive(self, "length")
        between(self, 0, 1e9, "gpus_per_run", "micro_batch_size")
        if len(set(self.seeds)) != len(self.seeds) or not self.seeds or min(self.seeds) < 0:
            raise ConfigError(f"--seeds must be different numbers from 0, not {self.seeds}.")
