"""Settings of `pecobook embed`, which writes image features to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

from pecobook.settings.images import MAX_BATCH, MAX_IMAGE_SIZE, MAX_WORKERS, ImagesConfig, NormalisationConfig
from pecobook.settings.tokenize import check_shard, part_of
from pecobook.settings.values import between, positive, refuse, settings_class

Pool: TypeAlias = Literal["auto", "mean", "class", "both", "none"]


@settings_class
class EmbedConfig(ImagesConfig, NormalisationConfig):
    """Write a feature vector for every image of a source, with the image's name, split and label."""

    backbone: str = ""
    """The network: a contrast, pretrain or finetune run, timm:NAME, or a tokenizer (a codebook run, dalle:FOLDER,
    diffusers:FOLDER). On the command line it may come first, without the flag."""
    weights: str = ""
    """A local file of weights for the backbone, or random for a control. If empty, the weights of --backbone."""
    out: str = ""
    """File to write: FILE.parquet, FILE.npz, or FILE.npy with a FILE.csv that names its rows."""
    image_size: int = 0
    """Side of the central crop of an image, in pixels; 0 uses the network's image size."""
    layer: int = 0
    """Transformer block whose output is used, counted from 1. 0 uses the last block, or for a pretrain run, whose last
    blocks serve the prediction of tokens, the block at three quarters of the depth."""
    pool: Pool = "auto"
    """mean of the patches, class token, both concatenated, or none for one vector per patch. auto uses the class token
    if it was trained, otherwise the mean."""
    codes: bool = False
    """With a tokenizer, also write each image's codes and their histogram."""
    batch_size: int = 64
    """Number of images that the network processes at once."""
    workers: int = -1
    """Number of data-loading processes; -1 chooses it from the number of cores."""
    shard: str = ""
    """I/N writes part I of N, while other processes or machines write the other parts; the last to finish joins the
    parts into the file."""
    overwrite: bool = False
    """Replace the file, and start over if an unfinished file has other settings."""

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
        """The part that this process writes, counted from 0, and the number of parts."""
        return part_of(self.shard)
