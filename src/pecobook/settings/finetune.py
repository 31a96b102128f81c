"""Settings of `pecobook finetune`, which trains a classifier."""

from __future__ import annotations

from pecobook.settings.images import ClipConfig, NormalisationConfig
from pecobook.settings.training import CropTrainConfig, OptimConfig, ResidualConfig, StartConfig
from pecobook.settings.values import below_one, between, not_negative, positive, refuse, settings_class


@settings_class
class FinetuneConfig(CropTrainConfig, StartConfig, NormalisationConfig, ResidualConfig):
    """Fine-tune a backbone on labelled images."""

    mixup: float = 0.8
    """Alpha of mixup; 0 disables it."""
    cutmix: float = 1.0
    """Alpha of CutMix; 0 disables it. Every batch gets mixup or CutMix, with equal probability."""
    label_smoothing: float = 0.1
    """Share of the target's probability that label smoothing spreads over all classes."""
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment policy in timm's notation: magnitude, its standard deviation, increasing severity; leave empty to
    disable RandAugment."""
    random_erasing: float = 0.25
    """Probability of random erasing, which fills a rectangle of the image with noise."""
    repeats: int = 1
    """Number of views of each image in a batch (repeated augmentation, arXiv 1901.09335; DeiT: 3). With 3, a batch
    holds a third as many distinct images, and an epoch's steps cover a third of all images."""
    average: float = 0.0
    """Decay of a moving average of the weights, which is evaluated and exported (BootMAE: 0.9998); 0 disables it."""
    eval_crop: float = 0.875
    """Share of an image's shorter side that the central crop for evaluation covers (224 of 256)."""
    head_rate: float = 1.0
    """Multiplier on the learning rate of the head."""
    clip: ClipConfig = ClipConfig()
    optim: OptimConfig = OptimConfig(lr=4e-3, warmup="20 epochs", layer_decay=0.65)
    evaluation_images: int = 50_000
    min_crop: float = 0.08
    max_steps: str = "100 epochs"
    batch_size: int = 1024

    def __post_init__(self) -> None:
        CropTrainConfig.__post_init__(self)
        StartConfig.__post_init__(self)
        NormalisationConfig.__post_init__(self)
        below_one(self, "average")
        between(self, 0.0, 1.0, "label_smoothing", "random_erasing", "eval_crop")
        positive(self, "eval_crop", "repeats", "head_rate")
        not_negative(self, "mixup", "cutmix")
        if self.clip.frames and self.init:
            refuse("init", "starts a classifier of images; for one of clips give --backbone.")
