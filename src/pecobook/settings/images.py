"""Settings of the images that a command reads: source, value range, normalisation, colour augmentation."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

from pecobook.settings.values import between, not_negative, positive, refuse, settings_class

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's pixels, RGB in [0, 1]: the normalisation of most networks."""


@settings_class
class JitterConfig:
    """Strength and probability of brightness and colour jitter; the defaults are MoCo v3's (arXiv 2104.02057)."""

    brightness: float = 0.4
    """Largest relative change in brightness."""
    contrast: float = 0.4
    """Largest relative change in contrast."""
    saturation: float = 0.2
    """Largest relative change in saturation."""
    hue: float = 0.1
    """Largest hue shift, as a fraction of the colour circle."""
    jitter: float = 0.8
    """Probability of changing brightness, contrast, saturation and hue."""
    grey: float = 0.2
    """Probability of converting the image to grey."""

    def __post_init__(self) -> None:
        not_negative(self, "brightness", "contrast", "saturation")
        between(self, 0.0, 0.5, "hue")
        between(self, 0.0, 1.0, "jitter", "grey")


@settings_class
class PhotometricConfig(JitterConfig):
    """Strength and probability of brightness and colour jitter, blur and solarisation."""

    blur: float = 0.0
    """Probability of applying a Gaussian blur."""
    solarise: float = 0.0
    """Probability of solarisation, which inverts the bright half of the values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0.0, 1.0, "blur", "solarise")


# Limits: the side of a view in pixels, images in a batch, data workers of a device, the factor on the length of runs.
MAX_IMAGE_SIZE, MAX_BATCH, MAX_WORKERS, MAX_LENGTH = 16_384, 2**20, 256, 1e6

RangeSetting: TypeAlias = tuple[float | str, ...]
AUTO: RangeSetting = ("auto",)
"""The value of --value-range that chooses the range."""


@settings_class
class ImagesConfig:
    """The images that a command reads."""

    data: str = "photos"
    """Images: a folder, a parquet file or folder, tar shards, hf:owner/name, tar shards or parquet at a URL (s3://,
    gs://, https://, hf://), or photos (built in)."""
    value_range: tuple[float | str, ...] = AUTO
    """Values mapped to black and white in images with more than 8 bits: LOW HIGH, or auto. auto takes the range that a
    given model was trained with; otherwise it looks at 64 images and prints the range it chose. 8-bit images keep their
    values."""

    def __post_init__(self) -> None:
        check_value_range(self.value_range)


def check_value_range(setting: RangeSetting) -> None:
    """Refuse a --value-range that is neither auto nor two ascending finite numbers."""
    numbers = [value for value in setting if not isinstance(value, str) and math.isfinite(value)]
    if setting != AUTO and not (len(numbers) == len(setting) == 2 and numbers[0] < numbers[1]):
        refuse("value_range", f"is auto or two ascending numbers LOW HIGH, not '{' '.join(map(str, setting))}'.")


@settings_class
class NormalisationConfig:
    """Input normalisation of a loaded network."""

    mean: tuple[float, ...] = ()
    """Mean of the backbone's input, three numbers for RGB in [0, 1]. If empty, the mean that the weights were trained
    with, which the run prints at its start."""
    std: tuple[float, ...] = ()
    """Standard deviation of the backbone's input, three numbers for RGB in [0, 1]; empty as for --mean."""

    def __post_init__(self) -> None:
        check_normalisation(self, "mean", "std")


def check_normalisation(config: Any, mean: str, std: str, *, lowest: float = 0.0, highest: float = 1.0) -> None:
    """Refuse a mean or a standard deviation that is not three numbers in range; `mean` and `std` are field names."""
    between(config, lowest, highest, mean)
    positive(config, std)
    for name in (mean, std):
        if len(getattr(config, name)) not in (0, 3):
            refuse(name, f"takes three numbers, not {len(getattr(config, name))}.")


@settings_class
class ClipConfig:
    """The video frames that a classifier reads (paper, Table 9)."""

    frames: int = 0
    """Number of frames in a clip; --data is then a folder of videos, or of folders of frames. 0 reads images."""
    sampling: Literal["stride", "segments"] = "stride"
    """How frames are chosen. stride takes every --clip.stride-th frame, starting at random in training and centred in
    the video in evaluation (Kinetics). segments takes one frame from each of --clip.frames equal parts of the video, a
    random one in training and the middle one in evaluation (Something-Something)."""
    stride: int = 32
    """Distance between consecutive frames of a clip with --clip.sampling stride. If a video is too short, the distance
    shrinks so that the clip spans the whole video."""
    flip: bool = True
    """Flip half of the clips in training. Turn it off if classes tell left from right, as Something-Something's do."""
    crops: int = 1
    """Square crops of a clip in evaluation: 1, the central one; 3, also those at both ends of the longer side, with the
    probabilities averaged."""

    def __post_init__(self) -> None:
        between(self, 0, 1024, "frames")
        positive(self, "stride", most=2**20)
        if self.crops not in (1, 3):
            refuse("crops", f"is 1 or 3, not {self.crops}.")


@settings_class
class ManyRunsConfig(ImagesConfig):
    """The images of a command that trains many runs and can be resumed in its folder."""

    verify_data: bool = False
    """Read all files of --data at the start, record their content, and compare it when the folder is resumed; without
    this flag, names, sizes and times are compared, and the content of a few files."""
    accept_data_change: bool = False
    """Continue even if the data have changed since the folder was started. Finished runs stay as they are."""
