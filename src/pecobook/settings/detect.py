"""`pecobook detect`: boxes and instance masks."""

from __future__ import annotations

import dataclasses

from pecobook.errors import ConfigError
from pecobook.settings.dense import PyramidConfig
from pecobook.settings.training import OptimConfig, TrainConfig
from pecobook.settings.values import between, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Heads of the detector."""

    width: int = 256
    """Number of channels of the feature pyramid network and of the mask head."""
    head_width: int = 1024
    """Width of the two layers that classify a box."""
    proposals: int = 1000
    """Largest number of regions that the first stage proposes in an image."""
    samples: int = 512
    """Largest number of regions of an image that the second stage learns from, a quarter of them objects."""
    detections: int = 100
    """Largest number of detections on an image."""
    score_threshold: float = 0.05
    """Lowest score of a detection."""

    def __post_init__(self) -> None:
        positive(self, "width", "head_width", "proposals", "samples", "detections")
        between(self, 0.0, 1.0, "score_threshold")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectConfig(TrainConfig):
    """Train a detector of boxes and masks on a backbone."""

    data: str = ""
    """Images and objects in COCO's format: a folder with train/instances.json and train/images/, and the same for val;
    or, as COCO's own, annotations/instances_train2017.json and train2017/."""
    skip_bad: bool = False
    """Leave out images and objects that cannot be used, instead of refusing them."""
    masks: bool = True
    """Learn instance masks beside boxes, where the objects have masks."""
    backbone: str = ""
    """The backbone to start from: a pretrain, contrast or finetune run, or timm:NAME."""
    weights: str = ""
    """A local file of weights for the backbone, or random to train from scratch; empty takes the backbone's own."""
    drop_path: float = 0.1
    """Stochastic depth: probability of skipping the last block; earlier blocks are skipped less."""
    pyramid: PyramidConfig = PyramidConfig()
    detector: DetectorConfig = DetectorConfig()
    scales: tuple[int, ...] = (800,)
    """Lengths of an image's short side in pixels, one of which is drawn; evaluation takes the largest."""
    max_size: int = 1333
    """Largest length of an image's long side, pixels."""
    jitter: tuple[float, ...] = ()
    """Large-scale jitter (arXiv 2012.07177) in place of --scales: two numbers, the smallest and the largest size of an
    image as a share of --image-size, the side of the square that is cut out of it or padded to. For example 0.1 2.0."""
    image_size: int = 1344
    """Side of the images that the backbone's positions are made for, pixels: the longest side, or the square of
    --jitter."""
    evaluation_images: int = 5000
    """Largest number of held-out images in each evaluation."""
    optim: OptimConfig = OptimConfig(
        lr=4e-4, layer_decay=0.75, warmup="500", schedule="steps", milestones=("8 epochs", "11 epochs")
    )
    max_steps: str = "12 epochs"
    """Length of the training: steps, "N epochs" or "N images"."""
    batch_size: int = 16
    """Images in one optimizer step, over all devices and accumulation steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0.0, 1.0, "drop_path")
        positive(self, "max_size")
        if not self.scales or min(self.scales) <= 0:
            raise ConfigError(f"--scales takes one or more lengths above 0, not {self.scales}.")
        if self.jitter and not (len(self.jitter) == 2 and 0 < self.jitter[0] <= self.jitter[1]):
            raise ConfigError(f"--jitter takes two numbers above 0, the smaller one first, not {self.jitter}.")

    @property
    def sides(self) -> tuple[int, int]:
        """Short and longest side of an image in evaluation."""
        return (self.image_size, self.image_size) if self.jitter else (max(self.scales), self.max_size)
