"""Settings of `pecobook detect`, which trains a detector of boxes and instance masks."""

from __future__ import annotations

from pecobook.settings.dense import PyramidConfig
from pecobook.settings.images import MAX_IMAGE_SIZE, NormalisationConfig
from pecobook.settings.training import OptimConfig, StartConfig, TrainConfig
from pecobook.settings.values import between, positive, refuse, settings_class


@settings_class
class DetectorConfig:
    """The heads of the detector."""

    width: int = 256
    """Number of channels in the feature pyramid network and the mask head."""
    head_width: int = 1024
    """Width of the two layers that classify a box."""
    proposals: int = 1000
    """Largest number of regions per image that the first stage proposes."""
    samples: int = 512
    """Largest number of regions per image that the second stage learns from, at most a quarter of which are objects."""
    detections: int = 100
    """Largest number of detections per image."""
    score_threshold: float = 0.05
    """Lowest score of a detection."""

    def __post_init__(self) -> None:
        positive(self, "width", "head_width", "proposals", "samples", "detections")
        between(self, 0.0, 1.0, "score_threshold")


@settings_class
class DetectConfig(TrainConfig, StartConfig, NormalisationConfig):
    """Train a detector of boxes and masks on a backbone.

    The training step cannot be compiled, because the number of objects varies between images.
    """

    data: str = ""
    """Folder of images and objects in COCO's format. It contains train/instances.json, train/images/,
    val/instances.json and val/images/, or the files of COCO 2017 (annotations/instances_train2017.json, train2017/,
    ...)."""
    skip_bad: bool = False
    """Leave out unusable images and objects instead of refusing them."""
    masks: bool = True
    """Also learn instance masks, if the objects have masks."""
    pyramid: PyramidConfig = PyramidConfig()
    detector: DetectorConfig = DetectorConfig()
    scales: tuple[int, ...] = (800,)
    """Lengths of an image's short side, in pixels. Training picks one at random, evaluation uses the largest."""
    max_size: int = 1333
    """Largest length of an image's long side, in pixels."""
    jitter: tuple[float, ...] = ()
    """Large-scale jitter (arXiv 2012.07177) instead of --scales: the smallest and the largest size of an image, as
    fractions of --image-size, for example 0.1 2.0; the image is then cropped or padded to a square of that side."""
    image_size: int = 1344
    """Side of the image area that the backbone's positions cover, in pixels: the longest side of an image, or the side
    of the square with --jitter."""
    optim: OptimConfig = OptimConfig(
        lr=4e-4, layer_decay=0.75, warmup="500", schedule="steps", milestones=("8 epochs", "11 epochs")
    )
    evaluation_images: int = 5000
    max_steps: str = "12 epochs"
    batch_size: int = 16

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        StartConfig.__post_init__(self)
        NormalisationConfig.__post_init__(self)
        positive(self, "scales", "max_size", most=MAX_IMAGE_SIZE)
        positive(self, "jitter")
        if not self.scales:
            refuse("scales", "takes one or more lengths above 0.")
        if self.jitter and not (len(self.jitter) == 2 and self.jitter[0] <= self.jitter[1]):
            refuse("jitter", f"takes two numbers above 0, the smaller number first, not {self.jitter}.")

    @property
    def sides(self) -> tuple[int, int]:
        """Short side of an image in evaluation, and the largest length of its long side, in pixels."""
        return (self.image_size, self.image_size) if self.jitter else (max(self.scales), self.max_size)
