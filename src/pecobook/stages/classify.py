"""Fine-tune a backbone for classification (PeCo section 4, BEiT's recipe): mean-pooled patches, a linear head."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.data.augment import check_policy, rand_augment, random_erasing
from pecobook.data.batch import Batch
from pecobook.data.sampler import key
from pecobook.data.source import ImageSource, Splits
from pecobook.data.stream import ViewFunction
from pecobook.data.views import central_view, random_crop
from pecobook.engine.optim import layer_decay_groups
from pecobook.engine.stage import Stage, StageOutput, mean_of_counted
from pecobook.errors import ConfigError
from pecobook.models.contrastive import ema_update
from pecobook.models.weights import Backbone, Classifier, load_backbone
from pecobook.settings.finetune import FinetuneConfig
from pecobook.settings.training import BaseOptimConfig
from pecobook.utils.images import channels_last, to_float


class ClassifyStage(Stage[FinetuneConfig]):
    """Backbone with a linear head over its mean-pooled patches.

    Args:
        config: all settings.
        classes: names of the classes.
        backbone: what `load_for_classification` gives; None loads it.
    """

    command = "finetune"

    mean: Tensor
    std: Tensor

    def __init__(self, config: FinetuneConfig, classes: tuple[str, ...], backbone: Backbone | None = None) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        backbone = backbone or load_for_classification(config)
        self.described = backbone.name, backbone.args, backbone.mean, backbone.std, config.image_size
        self.network = backbone.network
        self.network.reset_classifier(len(classes))  # type: ignore[operator]
        head = self.network.get_classifier()  # type: ignore[operator]
        if isinstance(head, nn.Linear):  # BEiT: a head that starts near zero leaves the backbone alone at first
            nn.init.trunc_normal_(head.weight, std=0.02 * 1e-3)
            nn.init.zeros_(head.bias)
        self.averaged = copy.deepcopy(self.network).requires_grad_(False) if config.average else None
        self.register_buffer("mean", torch.tensor(backbone.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std)[:, None, None], persistent=False)

    def forward(self, batch: Batch) -> StageOutput:
        """Cross-entropy of uint8 images (B, 3, H, W) and labels (B,); in evaluation also the five best classes."""
        images = (to_float(batch["image"]) - self.mean) / self.std
        labels = batch["label"]
        targets = F.one_hot(labels, len(self.classes)).float()
        network = self.network if self.training or self.averaged is None else self.averaged
        if self.training:
            images, targets = self._augmented(images, targets)
        logits = network(channels_last(images)).float()
        if self.training:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)
            return StageOutput(loss, {"top1": _top(logits, labels, 1)})
        loss = mean_of_counted(F.cross_entropy(logits, targets, reduction="none"), batch)
        best = logits.softmax(1).topk(min(5, len(self.classes)), 1)
        rows = {"index": batch["index"], "label": labels, "classes": best.indices, "probabilities": best.values}
        return StageOutput(loss, {}, rows=rows)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # its draws are numbers, which graphs would be built for
    def _augmented(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, H, W) and targets (B, classes), partly erased and mixed."""
        images = random_erasing(images, self.config.random_erasing) if self.config.random_erasing else images
        return mix(images, targets, mixup=self.config.mixup, cutmix=self.config.cutmix)

    def summarise(self, rows: dict[str, Tensor], known: dict[str, Tensor]) -> dict[str, float]:
        """Accuracy over all held-out images, in percent."""
        hits = rows["classes"] == rows["label"][:, None]  # (N, 5)
        found = {"top1": 100 * float(hits[:, 0].float().mean())}
        if len(self.classes) > 5:
            found["top5"] = 100 * float(hits.any(1).float().mean())
        return found

    def after_step(self, step: int, total: int) -> None:
        """Move the average, quickly at first."""
        if self.averaged is not None:
            ema_update(self.averaged, self.network, min(self.config.average, (1 + step) / (10 + step)))
            for own, other in zip(self.averaged.buffers(), self.network.buffers(), strict=True):
                own.copy_(other)

    def report(self, folder: Path, rows: dict[str, Tensor], source: ImageSource) -> None:
        """Write predictions.parquet, and a picture of which classes are taken for which."""
        from pecobook.analysis.confusion import confusion_picture, write_predictions

        write_predictions(folder / "predictions.parquet", rows, self.classes, source)
        picture = confusion_picture(rows["label"], rows["classes"][:, 0], self.classes)
        (folder / "samples" / "confusion.png").write_bytes(picture)

    def parameter_groups(self, config: BaseOptimConfig) -> list[dict[str, Any]]:
        """Groups with layer-wise learning rates."""
        return layer_decay_groups(self.network, config)

    def export(self, folder: Path, state: dict[str, Tensor]) -> str:
        """Write the classifier as a plain timm network with its classes."""
        prefix = "network." if self.averaged is None else "averaged."
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        whole = Classifier(self.network, *self.described, classes=self.classes, crop=self.config.eval_crop)
        whole.save_pretrained(folder, state=own, origin="classification")
        return whole.lines(str(folder))

    @classmethod
    def check(cls, config: FinetuneConfig) -> Backbone:
        """The backbone. Raises PecobookError for settings, or weights, that cannot be used."""
        check_policy(config.rand_augment)
        if not config.backbone:
            raise ConfigError("--backbone is missing: give a pretrain or contrast run, or timm:NAME.")
        return load_for_classification(config)

    @classmethod
    def needs_labels(cls, config: FinetuneConfig) -> bool:
        """Whether images without labels are of no use."""
        return True

    @classmethod
    def build(cls, config: FinetuneConfig, splits: Splits, made: Backbone | None = None) -> ClassifyStage:
        """The stage, with a random head."""
        return cls(config, splits.train.classes or (), made)

    @classmethod
    def view(cls, config: FinetuneConfig) -> ViewFunction:
        """What training reads of an image."""
        return partial(_augmented_view, size=config.image_size, min_area=config.min_crop, policy=config.rand_augment)

    @classmethod
    def evaluation_view(cls, config: FinetuneConfig) -> ViewFunction:
        """What evaluation reads of a held-out image."""
        return partial(central_view, size=config.image_size, share=config.eval_crop)


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


def _augmented_view(image: Tensor, view_key: int, *, size: int, min_area: float, policy: str) -> dict[str, Tensor]:
    crop = random_crop(image, size, view_key, min_area=min_area)
    return {"image": rand_augment(crop, policy, key(view_key, 3)) if policy else crop}
