"""Settings of `pecobook probe`, linear and k-NN probing."""

from __future__ import annotations

from pecobook.settings.images import MAX_IMAGE_SIZE, ImagesConfig, NormalisationConfig
from pecobook.settings.values import LARGEST, between, positive, settings_class


@settings_class
class ProbeConfig(ImagesConfig, NormalisationConfig):
    """Measure linear-probe and k-NN accuracy of a frozen backbone, or of a tokenizer's codewords.

    --backbone takes either: a backbone, or a tokenizer such as a codebook run.
    """

    data: str = "photos"
    """Labelled images: a folder of class folders, a parquet file or folder, tar shards, hf:owner/name, or photos."""
    backbone: str = ""
    """The backbone to probe: a contrast, pretrain or finetune run, or timm:NAME; or a tokenizer whose codewords are
    probed: a codebook run, dalle:FOLDER, diffusers:FOLDER."""
    weights: str = ""
    """A local file of weights for the backbone, or random for the control. If empty, the weights of --backbone."""
    out: str = ""
    """JSON file to write the results to; if empty, they are only printed."""
    image_size: int = 0
    """Side of the images, in pixels; 0 uses the backbone's image size."""
    max_train: int = 50_000
    """Largest number of training images, chosen by a fixed permutation."""
    max_test: int = 50_000
    """Largest number of test images."""
    seed: int = 0
    """Seed for the choice of validation images, and for random weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        NormalisationConfig.__post_init__(self)
        positive(self, "max_train", "max_test")
        between(self, 0, MAX_IMAGE_SIZE, "image_size")
        between(self, 0, LARGEST, "seed")
