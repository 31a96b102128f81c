"""Settings of `pecobook predict`, which applies a trained model to images."""

from __future__ import annotations

from typing import Literal

from pecobook.settings.images import AUTO, check_value_range
from pecobook.settings.segment import SegmentTestConfig
from pecobook.settings.values import LARGEST, between, positive, refuse, settings_class


@settings_class
class AttackConfig:
    """Adversarial attacks on a classifier (paper, Table 11).

    With an attack, no predictions are written; accuracy on labelled held-out images is measured with and without it.
    """

    names: tuple[Literal["bim", "mi-fgsm"], ...] = ()
    """White-box attacks: bim, the basic iterative method, and mi-fgsm, the same with momentum (MIM in the paper). With
    an attack, only the accuracy on labelled held-out images is measured."""
    eps: float = 2.0
    """Largest change of a value, in 1/255 of the range from black to white."""
    steps: int = 20
    """Number of steps of an attack."""
    step: float = 0.0
    """Change of a value in one step, in 1/255; 0 uses eps / steps."""
    max_images: int = 50_000
    """Largest number of held-out images, chosen by a fixed permutation."""

    def __post_init__(self) -> None:
        between(self, 0.0, 255.0, "eps", "step")
        positive(self, "steps", "max_images", most=LARGEST)
        if len(set(self.names)) != len(self.names):
            refuse("names", f"takes each attack once, not {self.names}.")


@settings_class
class PredictConfig:
    """Apply a trained classifier, segmenter or detector to images."""

    run: str = ""
    """A finetune, segment or detect run, or its export folder. On the command line it may come first, without the
    flag."""
    images: str = ""
    """An image, a folder of images at any depth, or another source of images; for a video classifier, a video or a
    folder of videos or of frames. On the command line it may come second, without the flag."""
    value_range: tuple[float | str, ...] = AUTO
    """Values mapped to black and white in images with more than 8 bits: LOW HIGH, or auto. auto takes the range that
    the run was trained with; otherwise it looks at 64 images and prints the range it chose."""
    out: str = ""
    """Folder to write; it must be new or empty."""
    pictures: bool = True
    """Also write every image with the predictions drawn on it."""
    score: float = 0.5
    """Lowest score of a detection that is drawn. detections.json contains all detections."""
    test: SegmentTestConfig = SegmentTestConfig()
    attack: AttackConfig = AttackConfig()

    def __post_init__(self) -> None:
        check_value_range(self.value_range)
        between(self, 0.0, 1.0, "score")
