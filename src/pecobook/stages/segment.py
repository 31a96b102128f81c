"""Semantic segmentation: UperNet on a backbone's pyramid, trained on crops (PeCo, supplement; BEiT's recipe)."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pecobook.analysis.confusion import matrix_picture
from pecobook.analysis.segments import count_pixels, intersection_over_union, overlay, scores
from pecobook.data.batch import Batch
from pecobook.data.dense.segmentation import SegmentationSource, open_segmentation
from pecobook.data.dense.segmentation_check import verify
from pecobook.data.dense.segmentation_classes import IGNORE
from pecobook.data.dense.views import resize_mask, segmentation_view
from pecobook.data.source import ImageSource, Splits
from pecobook.data.stream import ViewFunction
from pecobook.data.views import photometric
from pecobook.engine.launch import micro_batch_size, total_devices
from pecobook.engine.log import Progress
from pecobook.engine.optim import dense_groups
from pecobook.engine.stage import Stage, StageOutput, mean_of_counted, submodule_state
from pecobook.engine.world import is_leader
from pecobook.errors import ConfigError, DataError, listed
from pecobook.models.dense.pyramid import FeaturePyramid, build_pyramid, describe_pyramid
from pecobook.models.dense.segmenter import Segmenter, best_classes, rescaled_images, resize_to_pixels
from pecobook.models.initial import start_dense
from pecobook.models.weights import Backbone
from pecobook.settings.segment import SegmentConfig, SegmentTestConfig
from pecobook.settings.training import BaseOptimConfig
from pecobook.utils.files import write_atomically, write_json
from pecobook.utils.images import resize, to_float
from pecobook.utils.printer import say

_SAMPLED_MASKS = 64  # masks of each split that are read with --no-verify


class SegmentStage(Stage[SegmentConfig]):
    """A segmenter and its loss.

    Args:
        config: all settings.
        classes: names of the classes.
        networks: the feature pyramid of the settings and its backbone; None builds them.
    """

    command = "segment"
    has_one_size = False  # images are evaluated whole

    def __init__(
        self, config: SegmentConfig, classes: tuple[str, ...], networks: tuple[FeaturePyramid, Backbone] | None = None
    ) -> None:
        super().__init__()
        self.config, self.classes, self.min_batch_size = config, classes, _min_batch_size(config)
        pyramid, backbone = networks or build_pyramid(config)
        pyramid_settings = describe_pyramid(backbone, config.pyramid, config.image_size)
        self.model = Segmenter(pyramid, pyramid_settings, classes=classes, config=config)
        start = start_dense(self.model, config.init, "segmenter", classes)
        self.notes, self.model.init = (*start.notes, *backbone.notes), start.summary

    def forward(self, batch: Batch) -> StageOutput:
        """Return the cross-entropy of uint8 images (B, 3, S, S), masks int16 (B, S, S); in evaluation, count pixels."""
        if not self.training:
            return self._evaluate(batch)  # type: ignore[no-any-return]
        images = photometric(to_float(batch["image"]), batch["colour"], self.config.colours)
        main, auxiliary = self.model(images)
        truth = batch["mask"].long()
        loss, accuracy = _loss(main, truth, self.model.pyramid.patch)
        metrics = {"pixel_accuracy": 100 * accuracy}
        if auxiliary is not None:
            auxiliary_loss = _loss(auxiliary, truth, self.model.pyramid.patch)[0]
            metrics["auxiliary"] = auxiliary_loss.detach()
            loss = loss + self.config.auxiliary_weight * auxiliary_loss
        return StageOutput(loss, metrics)

    def loss_count(self, batch: Batch) -> Tensor:
        """Return the number of counted pixels, over which the losses and the accuracy are averaged."""
        return (batch["mask"] != IGNORE).sum()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # every picture may have another shape
    def _evaluate(self, batch: Batch) -> StageOutput:
        """Count the pixels of each class and prediction.

        The batch holds, for each image, one picture uint8 (3, h, w) per entry of `--test.scales`, one after the other,
        and a mask int16 (H, W).
        """
        num_scales, count = len(self.config.test.scales), len(self.classes)
        total = torch.zeros(1, count, count, dtype=torch.int64, device=batch["images"][0].device)
        losses: list[Tensor] = []
        samples: list[tuple[Tensor, Tensor, Tensor]] = []
        repeated = batch["repeated"].tolist() if "repeated" in batch else [False] * len(batch["masks"])
        for number, truth in enumerate(batch["masks"]):
            pictures = batch["images"][number * num_scales : (number + 1) * num_scales]
            class_scores = self.model.scores(pictures, self.config.test)  # (C, h, w)
            losses.append(self._held_out_loss(class_scores, truth))
            predicted = best_classes(class_scores, (int(truth.shape[0]), int(truth.shape[1])))
            if not repeated[number]:
                total += count_pixels(predicted, truth, count)
            if len(samples) < 8:
                samples.append(_sample_pictures(pictures[0], truth, predicted, self.config.image_size))
        columns = zip(("image", "truth", "predicted"), zip(*samples, strict=True), strict=True)
        sample_pictures = {name: torch.stack(parts) for name, parts in columns}
        return StageOutput(mean_of_counted(torch.stack(losses), batch), {}, sample_pictures, {"counts": total})

    def _held_out_loss(self, class_scores: Tensor, truth: Tensor) -> Tensor:
        """Return the cross-entropy, (), at the size of the scores (C, h, w); 0 if no pixel counts."""
        are_probabilities = len(self.config.test.scales) > 1 or self.config.test.flip  # means over several predictions
        logits = class_scores.clamp_min(1e-12).log() if are_probabilities else class_scores
        resized = resize_mask(truth, int(logits.shape[1]), int(logits.shape[2])).long()
        return F.cross_entropy(logits[None], resized[None], ignore_index=IGNORE).nan_to_num()

    def summarise(self, rows: dict[str, Tensor], reference_rows: dict[str, Tensor]) -> dict[str, float]:
        """Return mean IoU and accuracy over all held-out images, in percent."""
        return scores(rows["counts"].sum(0))

    def report(self, folder: Path, rows: dict[str, Tensor], source: ImageSource) -> None:
        """Write classes.json, with the IoU of every class, and a picture of the confusion matrix."""
        counts = rows["counts"].sum(0)
        iou = intersection_over_union(counts).tolist()
        percent = [None if math.isnan(value) else round(100 * value, 3) for value in iou]
        absent = [name for name, count in zip(self.classes, counts.sum(1).tolist(), strict=True) if not count]
        content = {"scores": scores(counts), "iou": dict(zip(self.classes, percent, strict=True))}
        if absent:
            content["without_pixels"] = absent
            held_out = f"{len(self.classes) - len(absent)} of {len(self.classes)} classes have held-out pixels"
            say(f"{held_out}, so that the mean IoU says nothing about the others: {', '.join(absent)}.")
        write_json(folder / "classes.json", content)
        write_atomically(folder / "samples" / "confusion.png", matrix_picture(counts, self.classes, "pixels"))

    def parameter_groups(self, config: BaseOptimConfig) -> list[dict[str, Any]]:
        """Return parameter groups: layer-wise learning rates in the backbone, the full rate elsewhere."""
        model = self.model
        heads = [model.pyramid.scale, model.head, *([model.auxiliary] if model.auxiliary else [])]
        return dense_groups(model.pyramid.network, heads, config, frozen=self.config.pyramid.frozen)

    def export(self, folder: Path, state: dict[str, Tensor]) -> str:
        """Write the segmenter with its backbone."""
        self.model.value_range = self.config.value_range
        self.model.save_pretrained(folder, state=submodule_state(state, "model"))
        return self.model.loading_code(self.config.out)

    @classmethod
    def open(cls, config: SegmentConfig) -> Splits:
        """Open the pairs of images and masks, and check every pair unless `--no-verify` is given.

        Unreadable pairs are left out and, with `--skip-bad`, also pairs whose image and mask do not match.
        """
        if not config.data:
            raise DataError("--data is missing: give a folder of images/ and masks/, or hf:owner/name.")
        splits = open_segmentation(
            config.data,
            classes=config.classes,
            mask_values=config.mask_values,
            ignore=config.ignore,
            skip_bad=config.skip_bad,
        )
        if not config.verify:
            if not cast("SegmentationSource", splits.train).mask_classes.names:
                raise ConfigError("--no-verify needs the classes: give --classes FILE or --mask-values.")
            return verify(splits, limit=_SAMPLED_MASKS).splits
        total = len(splits.train) + len(splits.evaluation)
        with Progress(total=total, start=0, name="masks", quiet=not is_leader()) as progress:
            checked = verify(splits, lambda done: progress.show(done, {}))
        if checked.problems and not config.skip_bad:
            raise DataError(
                f"--data '{config.data}':\n{listed(checked.problems)}\n{checked.hint}"
                "Correct the masks, add the value to --ignore if it means no class, or leave these pairs out with "
                "--skip-bad."
            )
        for source in (checked.splits.train, checked.splits.evaluation):
            if not len(source):
                reasons = listed([*checked.unreadable, *checked.problems])
                purpose = "train" if source.split == "train" else "evaluate"
                raise DataError(f"--data '{config.data}' has no pair that can be used to {purpose}:\n{reasons}")
        if checked.fault:
            raise DataError(checked.fault)
        num_valid, num_pairs = len(checked.splits.train), len(splits.train)
        if 10 * num_valid < num_pairs and not config.skip_bad:
            raise DataError(
                f"--data '{config.data}': {num_valid} of {num_pairs} training pairs can be used, the others cannot be "
                f"read:\n{listed(checked.unreadable)}\nMend them, or leave them out with --skip-bad."
            )
        for lines, number, reason in (
            (checked.problems, checked.num_problems, "do not fit"),
            (checked.unreadable, checked.num_unreadable, "cannot be read"),
        ):
            if lines:
                say(f"{number:,} of the pairs {reason} and are left out:\n{listed(lines)}")
        return checked.splits

    @classmethod
    def check(cls, config: SegmentConfig) -> tuple[FeaturePyramid, Backbone]:
        """Build the pyramid and its backbone. Raises PecobookError for unusable settings or weights."""
        if config.strategy == "fsdp" and config.test.mode == "slide" and total_devices(config) > 1:
            raise ConfigError(
                "--strategy fsdp and --test.mode slide exclude each other, since devices would wait for windows that "
                "others do not have: give --strategy ddp or --test.mode whole."
            )
        if micro_batch_size(config) < _min_batch_size(config):
            raise ConfigError(
                "UperNet normalises over a batch, so a device must hold 2 images or more; --pyramid.checkpointing true "
                "or a smaller --image-size save memory."
            )
        return build_pyramid(config)

    @classmethod
    def build(
        cls, config: SegmentConfig, splits: Splits, prebuilt: tuple[FeaturePyramid, Backbone] | None = None
    ) -> SegmentStage:
        """Build the stage, with random weights in the heads."""
        return cls(config, cast("SegmentationSource", splits.train).mask_classes.names, prebuilt)

    @classmethod
    def view(cls, config: SegmentConfig) -> ViewFunction:
        """Return the function that takes a random crop of an image and its mask."""
        return partial(
            segmentation_view,
            size=config.image_size,
            most=config.test.max_side,
            scales=config.scales,
            max_share=config.max_share,
        )

    @classmethod
    def evaluation_view(cls, config: SegmentConfig) -> ViewFunction:
        """Return the function that resizes a held-out image to the test sizes."""
        return partial(_held_out_view, size=config.image_size, test=config.test)


def _loss(logits: Tensor, truth: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of logits (B, C, h, w) and classes int64 (B, S, S), and the pixel accuracy, () each."""
    logits = resize_to_pixels(logits.float(), truth.shape[1:], patch)
    counted = truth != IGNORE
    total = counted.sum().clamp_min(1)
    # The sum is divided here, since cross_entropy's own mean over zero pixels is NaN.
    loss = F.cross_entropy(logits, truth, ignore_index=IGNORE, reduction="sum") / total
    return loss, ((logits.detach().argmax(1) == truth) & counted).sum() / total


def _sample_pictures(image: Tensor, truth: Tensor, predicted: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the image, then the image overlaid with its true and its predicted classes: float (3, side, side) each."""
    resized = resize(image.cpu(), side, side)
    overlays = [overlay(resized, resize_mask(classes.cpu(), side, side)) for classes in (truth, predicted)]
    return to_float(resized), to_float(overlays[0]), to_float(overlays[1])


def _min_batch_size(config: SegmentConfig) -> int:
    """Return a device's smallest batch: UperNet normalises over the batch, of all GPUs if there are several."""
    return 1 if torch.cuda.is_available() and total_devices(config) > 1 else 2


def _held_out_view(
    image: Tensor,
    mask: Tensor,
    view_key: int,  # noqa: ARG001
    *,
    size: int,
    test: SegmentTestConfig,
) -> dict[str, list[Tensor]]:
    """Resize a held-out image to the test sizes, and keep its mask; both in lists, since sizes differ."""
    return {"images": rescaled_images(image, size, test), "masks": [mask]}
