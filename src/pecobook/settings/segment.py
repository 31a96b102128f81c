"""Settings of `pecobook segment`, semantic segmentation."""

from __future__ import annotations

from pecobook.settings.dense import PyramidConfig
from pecobook.settings.images import MAX_IMAGE_SIZE, NormalisationConfig, PhotometricConfig
from pecobook.settings.training import CompileTrainConfig, OptimConfig, StartConfig
from pecobook.settings.values import below_one, between, positive, refuse, settings_class


@settings_class
class SegmentTestConfig:
    """How images of any size are segmented at test time."""

    mode: str = "whole"
    """Input of the network: whole, the image at once; or slide, which averages over windows of --image-size."""
    stride: float = 2 / 3
    """Step between windows, as a fraction of the window's side."""
    max_side: int = 2048
    """Largest length of the long side of the scaled image, in pixels. The short side becomes --image-size unless the
    long side would exceed this length."""
    scales: tuple[float, ...] = (1.0,)
    """Scales over which the prediction is averaged, as factors on the image's size; the result has the size of the
    first scale. The paper tests at one scale; a usual set is 1 0.5 0.75 1.25 1.5 1.75."""
    flip: bool = False
    """Also average the prediction over the mirrored image."""

    def __post_init__(self) -> None:
        if self.mode not in ("whole", "slide"):
            refuse("mode", f"is whole or slide, not '{self.mode}'.")
        between(self, 0.0, 1.0, "stride")
        positive(self, "stride", "scales")
        positive(self, "max_side", most=MAX_IMAGE_SIZE)
        if not self.scales:
            refuse("scales", "takes one or more factors above 0.")


@settings_class
class SegmenterConfig:
    """The heads of the segmenter."""

    head_width: int = 0
    """Number of channels of UperNet; 0 uses the width of the backbone."""
    auxiliary_width: int = 256
    """Number of channels of the auxiliary head; 0 removes this head."""
    auxiliary_weight: float = 0.4
    """Weight of the auxiliary head's loss."""
    dropout: float = 0.0
    """Share of the channels that each head drops before its classifier in training (mmsegmentation: 0.1)."""

    def __post_init__(self) -> None:
        between(self, 0, 65_536, "head_width", "auxiliary_width", "auxiliary_weight")
        below_one(self, "dropout")


@settings_class
class SegmentConfig(CompileTrainConfig, SegmenterConfig, StartConfig, NormalisationConfig):
    """Train semantic segmentation on images with masks."""

    data: str = ""
    """Images and masks: a folder with images/ and masks/ (directly, under train/ and val/, or as in ADE20K), or
    hf:owner/name."""
    classes: str = ""
    """File with one class per line, followed by the colour R G B if masks are colour images; or a table, JSON, CVAT's
    labelmap.txt or ADE20K's objectInfo150.txt. If empty, classes.txt, or such a file, in the folder."""
    mask_values: tuple[str, ...] = ()
    """Pixel values of the classes if they are not 0, 1, 2, ...: "0 255", or "1-150" as in ADE20K."""
    ignore: tuple[str, ...] = ("255",)
    """Pixel values or names of classes that are ignored in the loss and in the metrics."""
    verify: bool = True
    """Read every mask before training. With --no-verify only some masks are read, and --classes or --mask-values must
    define the classes."""
    skip_bad: bool = False
    """Leave out images with an unusable mask instead of refusing them: a mask whose size differs from the image's, or
    with an unknown value."""
    pyramid: PyramidConfig = PyramidConfig()
    scales: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest random scale of a training image, as factors on its size at test time."""
    max_share: float = 0.75
    """Largest share of a training crop that one class may fill; 1 for no limit."""
    colours: PhotometricConfig = PhotometricConfig(
        brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05, jitter=0.75, grey=0.0
    )
    test: SegmentTestConfig = SegmentTestConfig()
    image_size: int = 512
    """Side of the training crops, and short side of test images, in pixels."""
    optim: OptimConfig = OptimConfig(lr=3e-4, warmup="1500", layer_decay=0.65, schedule="poly")
    evaluation_images: int = 5000
    max_steps: str = "160000"
    batch_size: int = 16

    def __post_init__(self) -> None:
        CompileTrainConfig.__post_init__(self)
        SegmenterConfig.__post_init__(self)
        StartConfig.__post_init__(self)
        NormalisationConfig.__post_init__(self)
        between(self, 0.0, 1.0, "max_share")
        positive(self, "max_share", "scales")
        if self.scales[0] > self.scales[1]:
            refuse("scales", f"takes the smallest and the largest factor, not {self.scales}.")
