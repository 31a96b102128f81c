"""Fine-tune a backbone for classification (PeCo section 4, BEiT's recipe): mean-pooled patches, a linear head."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.config import OptimConfig, TrainConfig, between
from pecobook.data.images import ImageSource
from pecobook.data.sampler import key
from pecobook.data.stream import Batch, ViewFunction
from pecobook.data.views import central_view, random_crop, to_float
from pecobook.engine.loop import StageOutput
from pecobook.engine.optim import layer_decay_groups
from pecobook.errors import ConfigError
from pecobook.models.weights import Backbone, export_backbone, load_backbone
from pecobook.stages.stage import Stage, StageKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Fine-tune a backbone on labelled images."""

    backbone: str = ""
    """A pretrain or contrast run, or timm:NAME."""
    weights: str = ""
    """A local file of weights, or random to train from scratch; empty takes the backbone's own."""
    drop_path: float = 0.1
    """Stochastic depth: probability of skipping the last block; the first ones less."""
    mixup: float = 0.8
    """Alpha of mixup; 0 leaves it out."""
    cutmix: float = 1.0
    """Alpha of CutMix; 0 leaves it out. Every batch gets one of the two, by a fair coin."""
    label_smoothing: float = 0.1
    """Probability mass spread over all classes."""
    rand_augment: int = 9
    """Magnitude of RandAugment, of 31, with two operations; 0 leaves it out."""
    random_erasing: float = 0.25
    """Probability of erasing a rectangle."""
    min_crop: float = 0.08
    """Smallest share of an image's area that a random crop takes."""
    optim: OptimConfig = OptimConfig(lr=4e-3, warmup="20 epochs", layer_decay=0.65)
    max_steps: str = "100 epochs"
    """Length of the training: steps, "N epochs" or "N images"."""
    batch_size: int = 1024
    """Images in one optimizer step, over all devices and accumulation steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0.0, 1.0, "drop_path", "label_smoothing", "random_erasing")
        between(self, 0, 30, "rand_augment")


class ClassifyStage(Stage):
    """Backbone with a linear head over its mean-pooled patches.

    Args:
        config: all settings.
        classes: names of the classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: FinetuneConfig, classes: tuple[str, ...]) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        backbone = load_for_classification(config)
        self.name, self.args, self.statistics = backbone.name, backbone.args, (backbone.mean, backbone.std)
        self.network = backbone.network
        self.network.reset_classifier(len(classes))  # type: ignore[operator]
        head = self.network.get_classifier()  # type: ignore[operator]
        if isinstance(head, nn.Linear):  # BEiT: a head that starts near zero leaves the backbone alone at first
            nn.init.trunc_normal_(head.weight, std=0.02 * 1e-3)
            nn.init.zeros_(head.bias)
        self.register_buffer("mean", torch.tensor(backbone.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std)[:, None, None], persistent=False)

    def forward(self, batch: Batch) -> StageOutput:
        """Cross-entropy of uint8 images (B, 3, H, W) and labels (B,)."""
        images = (to_float(batch["image"]) - self.mean) / self.std
        labels = batch["label"]
        targets = F.one_hot(labels, len(self.classes)).float()
        if self.training:
            images, targets = mix(images, targets, mixup=self.config.mixup, cutmix=self.config.cutmix)
        logits = self.network(images).float()
        smoothing = self.config.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        metrics = {"top1": _top(logits, labels, 1)}
        if len(self.classes) > 5:
            metrics["top5"] = _top(logits, labels, 5)
        return StageOutput(loss, metrics)

    def parameter_groups(self, config: OptimConfig) -> list[dict[str, Any]]:
        """Groups with layer-wise learning rates."""
        return layer_decay_groups(self.network, config)

    def export(self, folder: Path, state: dict[str, Tensor]) -> str:
        """Write the classifier as a plain timm network with its classes."""
        own = {name.removeprefix("network."): value for name, value in state.items() if name.startswith("network.")}
        return export_backbone(
            folder,
            own,
            name=self.name,
            args=self.args,
            image_size=self.config.image_size,
            origin="classification",
            classes=self.classes,
            mean=self.statistics[0],
            std=self.statistics[1],
        )


def mix(images: Tensor, targets: Tensor, *, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Mixup or CutMix of a batch with itself reversed, by torch's global generator.

    Args:
        images: float (B, C, H, W).
        targets: float (B, classes), rows sum to 1.
        mixup: alpha of the Beta distribution of the share (arXiv 1710.09412); 0 for none.
        cutmix: the same for the pasted area (arXiv 1905.04899); 0 for none.
    """
    chosen = [name for name, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha > 0]
    if not chosen:
        return images, targets
    kind = chosen[int(torch.randint(len(chosen), ()))]
    alpha = mixup if kind == "mixup" else cutmix
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    if kind == "mixup":
        images = images.lerp(images.flip(0), 1 - share)
    else:
        height, width = images.shape[-2:]
        cut_height, cut_width = (round(side * (1 - share) ** 0.5) for side in (height, width))
        top = int(torch.randint(height - cut_height + 1, ()))
        left = int(torch.randint(width - cut_width + 1, ()))
        images = images.clone()
        region = (..., slice(top, top + cut_height), slice(left, left + cut_width))
        images[region] = images.flip(0)[region]
        share = 1 - cut_height * cut_width / (height * width)
    return images, targets.lerp(targets.flip(0), 1 - share)


def load_for_classification(config: FinetuneConfig) -> Backbone:
    """The backbone, pooled by the mean of its patches where it is a transformer."""
    return load_backbone(
        config.backbone,
        weights=config.weights or None,
        image_size=config.image_size,
        pool_mean=True,
        drop_path=config.drop_path,
    )


def _top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    return 100 * (logits.topk(k, 1).indices == labels[:, None]).any(1).float().mean()


def _check(config: FinetuneConfig) -> None:
    if not config.backbone:
        raise ConfigError("--backbone is missing: give a pretrain or contrast run, or timm:NAME.")
    load_for_classification(config)


def _build(config: FinetuneConfig, source: ImageSource) -> ClassifyStage:
    return ClassifyStage(config, source.classes or ())


def _augmented_view(
    image: Tensor, view_key: int, *, size: int, min_area: float, magnitude: int, erasing: float
) -> dict[str, Tensor]:
    from torchvision.transforms import v2

    crop = random_crop(image, size, view_key, min_area=min_area)
    operations: list[nn.Module] = []
    if magnitude:
        operations.append(v2.RandAugment(num_ops=2, magnitude=magnitude))
    if erasing:
        operations.append(v2.RandomErasing(p=erasing))
    # torchvision draws from the global generator: give it this view's key, then put back what was there.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(view_key, 3) >> 1)
        for operation in operations:
            crop = operation(crop)
    return {"image": crop}


def _view(config: FinetuneConfig) -> ViewFunction:
    return partial(
        _augmented_view,
        size=config.image_size,
        min_area=config.min_crop,
        magnitude=config.rand_augment,
        erasing=config.random_erasing,
    )


def _evaluation_view(config: FinetuneConfig) -> ViewFunction:
    return partial(central_view, size=config.image_size)


KIND: StageKind[FinetuneConfig] = StageKind(
    "finetune", _check, _build, _view, _evaluation_view, needs_labels=lambda _config: True
)
