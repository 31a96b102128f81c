"""Settings of `pecobook evaluate`, which measures tokenizers by the field's standard metrics."""

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
    """Codebook runs, export folders, owner/name on the Hugging Face hub, dalle:FOLDER, diffusers:FOLDER, taming:FILE,
    llamagen:FILE, fourm:FILE. On the command line they may come first, without the flag."""
    out: str = ""
    """Folder for evaluation.json and evaluation.md. It must be new or empty, unless --overwrite is given."""
    overwrite: bool = False
    """Delete an evaluation in --out first."""
    metrics: tuple[Metric, ...] = ()
    """Metrics to compute: rfid, is, psnr, ssim, lpips, perceptual, usage, speed. Empty computes all that are possible
    and says what the others lack; a metric that is named here but cannot be computed is an error."""
    split: Literal["held-out", "train", "all"] = "held-out"
    """Images of --data to use: held-out, split as in training; train; or all. Use all for a folder that contains only
    validation images."""
    num_images: int = 0
    """Largest number of images, chosen by a fixed permutation; 0 uses all. Published figures use 50,000."""
    image_size: int = 0
    """Side of the square to which images are centre-cropped and resized, in pixels; 0 uses each tokenizer's own."""
    batch_size: int = 32
    """Number of images that a tokenizer processes at once."""
    workers: int = -1
    """Number of data-loading processes; -1 chooses it from the number of cores."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast precision of the tokenizers. The metrics are always computed in fp32, and their statistics in fp64."""
    inception_weights: str = ""
    """A file with Inception's weights for rfid and is. If empty, they are taken from torch's download folder, or
    downloaded."""
    statistics: str = ""
    """An .npz file with the statistics of the originals for rfid: written if it does not exist, otherwise read, and
    refused if it belongs to other images, another size or other weights. A file from elsewhere (only mu and sigma) is
    used as is, and the output says so."""
    lpips_network: Literal["alex", "vgg", "squeeze"] = "alex"
    """The network that LPIPS uses."""
    lpips_weights: str = ""
    """A file with torchvision's weights for that network. If empty, they are taken from torch's download folder, or
    downloaded."""
    perceptual: str = ""
    """A perceptual network, named as in codebook's --perceptual.network, for the distance of equation 4."""
    perceptual_layers: tuple[int | str, ...] = (3, 6, 9, 12)
    """Layers of the --perceptual network."""
    perceptual_weights: str = ""
    """A local file of weights for the --perceptual network. If empty, the network's own weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        different(self, "metrics")
        check_layers(self, "perceptual_layers")
        between(self, 0, LARGEST, "num_images")
        between(self, 0, MAX_IMAGE_SIZE, "image_size")
        positive(self, "batch_size", most=MAX_BATCH)
        between(self, -1, MAX_WORKERS, "workers")
