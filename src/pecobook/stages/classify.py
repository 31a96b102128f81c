"""Fine-tune a backbone for classification (PeCo section 4, BEiT's recipe): mean-pooled patches, a linear head."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.data.batch import Batch
from pecobook.data.clips import central_clip, notes_on_frames, open_clips, random_clip
from pecobook.data.images import open_images
from pecobook.data.sampler import key
from pecobook.data.source import ImageSource, Splits
from pecobook.data.stream import ViewFunction
from pecobook.data.views import central_view, check_policy, rand_augment, random_crop, random_erasing
from pecobook.engine.optim import layer_decay_groups
from pecobook.engine.stage import Stage, StageOutput, mean_of_counted, submodule_state
from pecobook.errors import ConfigError
from pecobook.models.contrastive import ema_update
from pecobook.models.dry_run import dry_run, refusing
from pecobook.models.export import check_kind
from pecobook.models.initial import start_head
from pecobook.models.residual import keep_residuals_low
from pecobook.models.video import ClipClassifier, ClipNetwork, image_network
from pecobook.models.weights import Backbone, Classifier, load_backbone
from pecobook.settings.finetune import FinetuneConfig
from pecobook.settings.training import BaseOptimConfig
from pecobook.utils.files import write_atomically
from pecobook.utils.images import Normalised, channels_last, to_float


class Kind(NamedTuple):
    """The classified items, images or clips: how they are opened and viewed, and which classifier is exported."""

    open: Callable[[str], Splits]
    view: ViewFunction
    evaluation_view: ViewFunction
    classifier: Callable[..., Classifier]


def kind_of(config: FinetuneConfig) -> Kind:
    """Return the kind of items that the settings classify."""
    clip = config.clip
    if not clip.frames:
        return Kind(_open_images, _augmented_view, central_view, Classifier)
    view, evaluation_view = partial(random_clip, config=clip), partial(central_clip, config=clip)
    return Kind(open_clips, view, evaluation_view, partial(ClipClassifier, clip=clip))


class ClassifyStage(Normalised, Stage[FinetuneConfig]):
    """A backbone with a linear head on its mean-pooled patch features, for images or clips (`models.video`).

    Args:
        config: all settings.
        classes: names of the classes.
        backbone: the backbone of the settings; None loads it.
    """

    command = "finetune"

    def __init__(self, config: FinetuneConfig, classes: tuple[str, ...], backbone: Backbone | None = None) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        backbone = backbone or load_for_classification(config)
        self._backbone_fields = backbone.name, backbone.args, backbone.mean, backbone.std, config.image_size
        self.network, self.notes = backbone.network, backbone.notes
        with refusing(backbone.name, "be fine-tuned for classification"):
            self.network.reset_classifier(len(classes))  # type: ignore[operator]
            heads = self.network.get_classifier()  # type: ignore[operator]
        for head in heads if isinstance(heads, tuple) else (heads,):  # a distilled network has two
            if isinstance(head, nn.Linear):  # as in BEiT: while the head is near zero, the backbone hardly changes
                nn.init.trunc_normal_(head.weight, std=0.02 * 1e-3)
                if head.bias is not None:
                    nn.init.zeros_(head.bias)
        start = start_head(self.network, config.init, self.classes)
        self.notes, self.init = (*start.notes, *self.notes), start.summary
        if config.residual == "bf16":
            keep_residuals_low(getattr(self.network, "blocks", None), backbone.name)
        self.averaged = copy.deepcopy(self.network).requires_grad_(False) if config.average else None
        self.set_normalisation(backbone.mean, backbone.std)

    def forward(self, batch: Batch) -> StageOutput:
        """Return the cross-entropy of uint8 images (B, 3, H, W); in evaluation also the five best classes.

        Clips have the shape (B, T, 3, H, W), or in evaluation, with V crops, (B, V, T, 3, H, W).
        """
        images = self.normalise(to_float(batch["image"]))
        labels = batch["label"]
        targets = F.one_hot(labels, len(self.classes)).float()
        network = self.network if self.training or self.averaged is None else self.averaged
        if self.training:
            images, targets = self._augment(images, targets)
        logits = network(images if images.ndim > 4 else channels_last(images)).float()
        if self.training:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.config.label_smoothing)
            return StageOutput(loss, {"top1": 100 * (logits.argmax(1) == labels).float().mean()})
        loss = mean_of_counted(F.cross_entropy(logits, targets, reduction="none"), batch)
        best = logits.softmax(1).topk(min(5, len(self.classes)), 1)
        rows = {"index": batch["index"], "label": labels, "classes": best.indices, "probabilities": best.values}
        return StageOutput(loss, {}, rows=rows)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # compiling would build a graph for each drawn number
    def _augment(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Erase parts of normalised images (B, ..., 3, H, W), and mix the images and their targets (B, classes).

        All frames of a clip are treated alike.
        """
        if self.config.random_erasing:
            images = random_erasing(images.flatten(1, -3), self.config.random_erasing).view_as(images)
        return mix(images, targets, mixup=self.config.mixup, cutmix=self.config.cutmix)

    def repeats(self) -> int:
        """Return the number of views of each image in a batch."""
        return self.config.repeats

    def summarise(self, rows: dict[str, Tensor], reference_rows: dict[str, Tensor]) -> dict[str, float]:
        """Return the accuracy over all held-out images or clips, in percent."""
        hits = rows["classes"] == rows["label"][:, None]  # (N, 5)
        metrics = {"top1": 100 * float(hits[:, 0].float().mean())}
        if len(self.classes) > 5:
            metrics["top5"] = 100 * float(hits.any(1).float().mean())
        return metrics

    def after_step(self, step: int, total: int) -> None:
        """Update the averaged weights; the decay grows from small values to `config.average`."""
        if self.averaged is not None:
            ema_update(self.averaged, self.network, min(self.config.average, (1 + step) / (10 + step)))
            for average, current in zip(self.averaged.buffers(), self.network.buffers(), strict=True):
                average.copy_(current)

    def report(self, folder: Path, rows: dict[str, Tensor], source: ImageSource) -> None:
        """Write predictions.parquet and a picture of the confusion matrix."""
        from pecobook.analysis.confusion import confusion_picture, write_predictions

        write_predictions(folder / "predictions.parquet", rows, self.classes, source)
        picture = confusion_picture(rows["label"], rows["classes"][:, 0], self.classes, source.unit)
        write_atomically(folder / "samples" / "confusion.png", picture)

    def parameter_groups(self, config: BaseOptimConfig) -> list[dict[str, Any]]:
        """Return parameter groups with layer-wise learning rates; those of the head are multiplied by `head_rate`."""
        groups = layer_decay_groups(image_network(self.network), config)
        if self.config.head_rate == 1:
            return groups
        heads = self.network.get_classifier()  # type: ignore[operator]
        heads = heads if isinstance(heads, tuple) else (heads,)
        of_head = {parameter for head in heads for parameter in head.parameters()}
        split = []
        for group in groups:
            for is_head, rate in ((False, 1.0), (True, self.config.head_rate)):
                parameters = [parameter for parameter in group["params"] if (parameter in of_head) == is_head]
                split += [{**group, "params": parameters, "lr_scale": rate * group["lr_scale"]}] if parameters else []
        return split

    def export(self, folder: Path, state: dict[str, Tensor]) -> str:
        """Write the classifier (for images, as a plain timm network) with its class names."""
        weights = submodule_state(state, "network" if self.averaged is None else "averaged")
        fields = {"classes": self.classes, "crop": self.config.eval_crop}
        classifier = kind_of(self.config).classifier(self.network, *self._backbone_fields, **fields)
        classifier.value_range, classifier.init = self.config.value_range, self.init
        classifier.save_pretrained(folder, state=weights, origin="classification")
        return str(classifier.loading_code(str(folder)))

    @classmethod
    def check(cls, config: FinetuneConfig) -> Backbone:
        """Load the backbone. Raises PecobookError for unusable settings or weights."""
        check_policy(config.rand_augment)
        if not (config.backbone or config.init):
            raise ConfigError("--backbone is missing: give a pretrain or contrast run, or timm:NAME.")
        backbone = load_for_classification(config)
        frames = [config.clip.frames] if config.clip.frames else []
        images = torch.zeros(2, *frames, 3, config.image_size, config.image_size)
        purpose = f"learn from images of {config.image_size} pixels"
        name = config.backbone or config.init
        dry_run(backbone.network, (images,), network=name, purpose=purpose)
        with refusing(name, "be trained with a learning rate for each layer"):
            layer_decay_groups(image_network(backbone.network), config.optim)
        return backbone

    @classmethod
    def open(cls, config: FinetuneConfig) -> Splits:
        """Open the images, or the clips, of `--data`."""
        return kind_of(config).open(config.data)

    @classmethod
    def needs_labels(cls, config: FinetuneConfig) -> bool:
        """Return True: a classifier learns only from labels."""
        return True

    @classmethod
    def build(cls, config: FinetuneConfig, splits: Splits, prebuilt: Backbone | None = None) -> ClassifyStage:
        """Build the stage, with random weights in the head."""
        return cls(config, splits.train.classes or (), prebuilt)

    @classmethod
    def view(cls, config: FinetuneConfig) -> ViewFunction:
        """Return the function that takes a random, augmented crop of an image or of a clip's frames."""
        rules: dict[str, Any] = {"size": config.image_size, "min_area": config.min_crop, "policy": config.rand_augment}
        return partial(kind_of(config).view, **rules)

    @classmethod
    def evaluation_view(cls, config: FinetuneConfig) -> ViewFunction:
        """Return the function that takes the central crop of a held-out image or clip."""
        return partial(kind_of(config).evaluation_view, size=config.image_size, share=config.eval_crop)


def mix(images: Tensor, targets: Tensor, *, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Apply Mixup or CutMix: mix a batch with the reversed batch, using torch's global generator.

    If both are on, each batch uses one of them, with equal probability.

    Args:
        images: float (B, ..., H, W).
        targets: float (B, classes), rows sum to 1.
        mixup: alpha of the Beta distribution of Mixup's share (arXiv 1710.09412); 0 switches Mixup off.
        cutmix: alpha of the Beta distribution of CutMix's uncut area (arXiv 1905.04899); 0 switches CutMix off.
    """
    kinds = [(name, alpha) for name, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha > 0]
    if not kinds:
        return images, targets
    kind, alpha = kinds[int(torch.randint(len(kinds), ()))]
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
    """Load the network of `--backbone` or `--init`; a transformer pools the mean of its patches."""
    if config.init:
        check_kind(config.init, "classifier", "finetune")
    backbone = load_backbone(
        config.backbone or config.init,
        weights=config.weights or None,
        image_size=config.image_size,
        pool_mean=True,
        drop_path=config.drop_path,
        mean=config.mean,
        std=config.std,
    )
    if config.clip.frames:
        with refusing(backbone.name, "read clips", "Choose a ViT or a BEiT."):
            backbone.network = ClipNetwork(backbone.network, config.clip.frames)
    return backbone


def _open_images(data: str) -> Splits:
    splits = open_images(data)
    return dataclasses.replace(splits, notes=(*splits.notes, *notes_on_frames(splits.train)))


def _augmented_view(image: Tensor, view_key: int, *, size: int, min_area: float, policy: str) -> dict[str, Tensor]:
    crop = random_crop(image, size, view_key, min_area=min_area)
    return {"image": rand_augment(crop, policy, key(view_key, 3)) if policy else crop}
