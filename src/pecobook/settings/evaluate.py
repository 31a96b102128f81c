"""Settings of `pecobook evaluate`, which measures tokenizers by the yardsticks of their field."""

from __future__ import annotations

from typing import Literal

from pecobook.settings.images import MAX_BATCH, MAX_IMAGE_SIZE, MAX_WORKERS, ImagesConfig
from pecobook.settings.perceptual import check_layers
from pecobook.settings.values import LARGEST, between, different, positive, settings_class

Metric = Literal["rfid", "is", "psnr", "ssim", "lpips", "perceptual", "usage", "speed"]
METRICS: tuple[Metric, ...] = ("rfid", "is", "psnr", "ssim", "lpips", "perceptual", "usage", "speed")


@settings_class
class EvaluateConfig(ImagesConfig):
    """Measure tokenizers side by side on the same images: rFID, IS, PSNR, SSIM, LPIPS, usage, speed."""

    tokenizers: tuple[str, ...] = ()
    """Codebook runs, export folders, owner/name on the hub, dalle:FOLDER, diffusers:FOLDER, taming:FILE,
    llamagen:FILE, fourm:FILE. On the command line they may stand first, without the flag."""
    out: str = ""
    """Folder for evaluation.json and evaluation.md. It must be new or empty, unless --overwrite is given."""
    overwrite: bool = False
    """Delete an evaluation in --out first."""
    metrics: tuple[Metric, ...] = ()
    """What is measured: rfid, is, psnr, ssim, lpips, perceptual, usage, speed. Empty measures all that can be measured,
    and says what was missing for the rest; what is named here and cannot be measured is an error."""
    split: Literal["held-out", "train", "all"] = "held-out"
    """The images of --data: held-out as in training, train, or all. A folder that holds validation images alone is read
    with all."""
    num_images: int = 0
    """Largest number of images, chosen by a fixed permutation; 0 takes all. Published figures take 50,000."""
    image_size: int = 0
    """Side of the central square to which an image is cropped and resized, pixels; 0 takes that of each tokenizer."""
    batch_size: int = 32
    """Images that a tokenizer reads at once."""
    workers: int = -1
    """Data-loading processes; -1 chooses by the number of cores."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of autocast in the tokenizers. The metrics are always computed in fp32, their statistics in fp64."""
    inception_weights: str = ""
    """A file of the weights of Inception for rfid and is; empty takes them from torch's folder of downloads, or
    downloads them."""
    statistics: str = ""
    """An .npz file with the statistics of the originals for rfid: written where there is none, else read, and refused
    where it is of other images, another size or other weights. A file of others (mu and sigma alone) is taken as it
    is, which the output says."""
    lpips_network: Literal["alex", "vgg", "squeeze"] = "alex"
    """The network of LPIPS."""
    lpips_weights: str = ""
    """A file of torchvision's weights for that network; empty takes them from torch's folder of downloads, or
    downloads them."""
    perceptual: str = ""
    """A perceptual network, named as in codebook's --perceptual.network, for the distance of equation 4."""
    perceptual_layers: tuple[int | str, ...] = (3, 6, 9, 12)
    """Layers of the network of --perceptual."""
    perceptual_weights: str = ""
    """A local file of weights for the network of --perceptual; empty takes the network's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        different(self, "metrics")
        check_layers(self, "perceptual_layers")
        between(self, 0, LARGEST, "num_images")
        between(self, 0, MAX_IMAGE_SIZE, "image_size")
        positive(self, "batch_size", most=MAX_BATCH)
        between(self, -1, MAX_WORKERS, "workers")
