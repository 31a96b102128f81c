"""Settings of `pecobook embed`, which writes features of images to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from pecobook.settings.images import MAX_BATCH, MAX_IMAGE_SIZE, MAX_WORKERS, ImagesConfig, NormalisationConfig
from pecobook.settings.tokenize import check_shard, part_of
from pecobook.settings.values import between, positive, refuse, settings_class

Pool: TypeAlias = Literal["auto", "mean", "class", "both", "none"]


@settings_class
class EmbedConfig(ImagesConfig, NormalisationConfig):
    """Write a feature vector of every image of a source, with the image's name, split and label."""

    backbone: str = ""
    """The network: a contrast, pretrain or finetune run, timm:NAME, or a tokenizer (a codebook run, dalle:FOLDER,
    diffusers:FOLDER). On the command line it may stand first, without the flag."""
    weights: str = ""
    """A local file of weights for the backbone, or random for a control. Empty takes the weights of --backbone."""
    out: str = ""
    """File to write: FILE.parquet, FILE.npz, or FILE.npy with FILE.csv for the names of its rows."""
    image_size: int = 0
    """Side of the central crop of an image, pixels; 0 takes the image size of the network."""
    layer: int = 0
    """Block of a transformer whose output is taken, from 1. 0 takes the last one; of a pretrain run, whose last blocks
    serve the prediction of tokens, the block at three quarters of the depth."""
    pool: Pool = "auto"
    """mean of the patches, the class token, both joined, or none for a vector of every patch. auto takes the class
    token where it was trained, else the mean."""
    codes: bool = False
    """With a tokenizer: also write the codes of each image and the histogram of its codes."""
    batch_size: int = 64
    """Images that the network reads at once."""
    workers: int = -1
    """Data-loading processes; -1 chooses by the number of cores."""
    shard: str = ""
    """I/N writes part I of N, beside other processes or machines with the other parts; whoever finishes last joins the
    parts to the file."""
    overwrite: bool = False
    """Replace the file, and begin again where an unfinished file has other settings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        NormalisationConfig.__post_init__(self)
        between(self, 0, MAX_IMAGE_SIZE, "image_size", "layer")
        positive(self, "batch_size", most=MAX_BATCH)
        between(self, -1, MAX_WORKERS, "workers")
        check_shard(self)
        if self.out and Path(self.out).suffix.lower() not in (".parquet", ".npy", ".npz"):
            refuse("out", f"is a file .parquet, .npy or .npz, not '{self.out}'.")

    @property
    def part(self) -> tuple[int, int]:
        """The part of --shard that this process writes, counted from 0, and the number of parts."""
        return part_of(self.shard)
