"""Semantic segmentation: UperNet on a backbone's pyramid, trained on crops (PeCo, supplement; BEiT's recipe)."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pecobook.analysis.segments import count_pixels, intersection_over_union, overlay, scores
from pecobook.data.batch import Batch
from pecobook.data.dense.segmentation import SegmentationSource, open_segmentation
from pecobook.data.dense.segmentation_check import verify
from pecobook.data.dense.segmentation_classes import IGNORE
from pecobook.data.dense.segmentation_views import resize_mask, training_view
from pecobook.data.source import ImageSource, Splits
from pecobook.data.stream import ViewFunction
from pecobook.data.views import photometric
from pecobook.engine.launch import is_leader, micro_batch_size, world_size
from pecobook.engine.optim import dense_groups
from pecobook.engine.stage import Stage, StageOutput, mean_of_counted
from pecobook.errors import ConfigError, DataError, listed
from pecobook.models.dense.pyramid import FeaturePyramid, describe_pyramid, pyramid_of
from pecobook.models.dense.segmenter import Segmenter, best_classes, scaled_pictures, stretch
from pecobook.models.weights import Backbone
from pecobook.settings.segment import SegmentConfig, SegmentTestConfig
from pecobook.settings.training import BaseOptimConfig
from pecobook.utils.images import resize, to_float


class SegmentStage(Stage[SegmentConfig]):
    """A segmenter and its loss.

    Args:
        config: all settings.
        classes: names of the classes.
        opened: what `pyramid_of` gives; None opens it.
    """

    command = "segment"

    def __init__(
        self, config: SegmentConfig, classes: tuple[str, ...], opened: tuple[FeaturePyramid, Backbone] | None = None
    ) -> None:
        super().__init__()
        self.config, self.classes, self.min_batch_size = config, classes, _min_batch_size(config)
        pyramid, backbone = opened or pyramid_of(config)
        described = describe_pyramid(backbone, config.pyramid, config.image_size)
        self.model = Segmenter(pyramid, described, classes=classes, config=config)

    def forward(self, batch: Batch) -> StageOutput:
        """Cross-entropy of uint8 images (B, 3, S, S) and masks int16 (B, S, S); in evaluation, pixels counted."""
        if not self.training:
            return self._evaluate(batch)  # type: ignore[no-any-return]
        images = photometric(to_float(batch["image"]), batch["colour"], self.config.colours)
        main, auxiliary = self.model(images)
        truth = batch["mask"].long()
        loss, right = _loss(main, truth)
        metrics = {"pixel_accuracy": 100 * right}
        if auxiliary is not None:
            extra = _loss(auxiliary, truth)[0]
            metrics["auxiliary"] = extra.detach()
            loss = loss + self.config.auxiliary_weight * extra
        return StageOutput(loss, metrics)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # every picture has another shape
    def _evaluate(self, batch: Batch) -> StageOutput:
        """Of each image, pictures uint8 (3, h, w) at the test's sizes, one after the other; masks int16 (H, W)."""
        sizes, count = len(self.config.test.scales), len(self.classes)
        total = torch.zeros(1, count, count, dtype=torch.int64, device=batch["images"][0].device)
        losses: list[Tensor] = []
        shown: list[tuple[Tensor, Tensor, Tensor]] = []
        repeated = batch["repeated"].tolist() if "repeated" in batch else [False] * len(batch["masks"])
        for number, truth in enumerate(batch["masks"]):
            pictures = batch["images"][number * sizes : (number + 1) * sizes]
            found = self.model.scores(pictures, self.config.test)  # (C, h, w)
            losses.append(self._held_out_loss(found, truth))
            predicted = best_classes(found, (int(truth.shape[0]), int(truth.shape[1])))
            if not repeated[number]:
                total += count_pixels(predicted, truth, count)
            if len(shown) < 8:
                shown.append(_three(pictures[0], truth, predicted, self.config.image_size))
        drawn = {name: torch.stack(parts) for name, parts in zip(_SHOWN, zip(*shown, strict=True), strict=True)}
        return StageOutput(mean_of_counted(torch.stack(losses), batch), {}, drawn, {"counts": total})

    def _held_out_loss(self, found: Tensor, truth: Tensor) -> Tensor:
        """Cross-entropy at the size of the scores (C, h, w), (); 0 where nothing counts."""
        averaged = len(self.config.test.scales) > 1 or self.config.test.flip
        logits = found.clamp_min(1e-12).log() if averaged else found
        small = resize_mask(truth, int(found.shape[1]), int(found.shape[2])).long()
        return F.cross_entropy(logits[None], small[None], ignore_index=IGNORE).nan_to_num()

    def summarise(self, rows: dict[str, Tensor], known: dict[str, Tensor]) -> dict[str, float]:
        """Mean IoU and accuracy over all held-out images, in percent."""
        return scores(rows["counts"].sum(0))

    def report(self, folder: Path, rows: dict[str, Tensor], source: ImageSource) -> None:
        """Write classes.json, the IoU of every class, and a picture of which are taken for which."""
        from pecobook.analysis.confusion import matrix_picture

        counts = rows["counts"].sum(0)
        each = [None if value != value else round(100 * value, 3) for value in intersection_over_union(counts).tolist()]
        found = {"scores": scores(counts), "iou": dict(zip(self.classes, each, strict=True))}
        (folder / "classes.json").write_text(json.dumps(found, indent=2) + "\n")
        (folder / "samples" / "confusion.png").write_bytes(matrix_picture(counts, self.classes, "pixels"))

    def parameter_groups(self, config: BaseOptimConfig) -> list[dict[str, Any]]:
        """The heads at the full rate, the backbone with layer-wise ones."""
        own = self.model
        above = [own.pyramid.scale, own.head, *([own.auxiliary] if own.auxiliary else [])]
        return dense_groups(own.pyramid.network, above, config, frozen=self.config.pyramid.frozen)

    def export(self, folder: Path, state: dict[str, Tensor]) -> str:
        """Write the segmenter, complete."""
        own = {name.removeprefix("model."): value for name, value in state.items()}
        self.model.save_pretrained(folder, state=own)
        return self.model.lines(self.config.out)

    @classmethod
    def open(cls, config: SegmentConfig) -> Splits:
        """The source, every pair of it looked at."""
        from pecobook.engine.log import Progress

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
            if not cast("SegmentationSource", splits.train).meaning.names:
                raise ConfigError("--no-verify needs to be told the classes: give --classes FILE or --mask-values.")
            return splits
        progress = Progress(
            total=len(splits.train) + len(splits.evaluation), start=0, name="masks", quiet=not is_leader()
        )
        try:
            found = verify(splits, lambda done: progress.show(done, {}))
        finally:
            progress.close()
        if found.problems and not config.skip_bad:
            raise DataError(
                f"--data '{config.data}':\n{listed(found.problems)}\n"
                "Mend them, name the value in --ignore if it means nothing, or leave these pairs out with --skip-bad."
            )
        for source in (found.splits.train, found.splits.evaluation):
            if not len(source):
                wrong = listed([*found.unreadable, *found.problems])
                raise DataError(
                    f"--data '{config.data}' has no pair that can be used to {_USE[source.split]}:\n{wrong}"
                )
        for lines, what in ((found.problems, "do not fit"), (found.unreadable, "cannot be read")):
            if lines and is_leader():
                print(f"{len(lines)} of the pairs {what} and are left out:\n{listed(lines)}", file=sys.stderr)
        return found.splits

    @classmethod
    def check(cls, config: SegmentConfig) -> tuple[FeaturePyramid, Backbone]:
        """The pyramid and its backbone. Raises PecobookError for settings, or weights, that cannot be used."""
        if config.strategy == "fsdp" and config.test.mode == "slide" and world_size(config) > 1:
            raise ConfigError(
                "--strategy fsdp and --test.mode slide exclude each other, since devices would wait for windows that "
                "others do not have: give --strategy ddp or --test.mode whole."
            )
        if micro_batch_size(config) < _min_batch_size(config):
            raise ConfigError(
                "UperNet normalises over a batch, so a device must hold 2 images or more; --pyramid.checkpointing true "
                "or a smaller --image-size save memory."
            )
        return pyramid_of(config)

    @classmethod
    def build(
        cls, config: SegmentConfig, splits: Splits, made: tuple[FeaturePyramid, Backbone] | None = None
    ) -> SegmentStage:
        """The stage, with random heads."""
        return cls(config, cast("SegmentationSource", splits.train).meaning.names, made)

    @classmethod
    def view(cls, config: SegmentConfig) -> ViewFunction:
        """What training reads of an image."""
        return partial(
            training_view,
            size=config.image_size,
            most=config.test.max_side,
            scales=config.scales,
            max_share=config.max_share,
        )

    @classmethod
    def evaluation_view(cls, config: SegmentConfig) -> ViewFunction:
        """What evaluation reads of a held-out image."""
        return partial(_whole_view, size=config.image_size, test=config.test)


def _loss(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits (B, C, h, w) against classes int64 (B, S, S), and the share that is right, ()."""
    logits = stretch(logits.float(), truth.shape[1:])
    counted = truth != IGNORE
    total = counted.sum().clamp_min(1)
    # By hand, since the mean over nothing is not a number.
    loss = F.cross_entropy(logits, truth, ignore_index=IGNORE, reduction="sum") / total
    return loss, ((logits.detach().argmax(1) == truth) & counted).sum() / total


_SHOWN = ("image", "truth", "predicted")


def _three(image: Tensor, truth: Tensor, predicted: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """The image alone, under the truth and under what was predicted: float (3, side, side) in [0, 1] each."""
    small = resize(image.cpu(), side, side)
    painted = [overlay(small, resize_mask(classes.cpu(), side, side)) for classes in (truth, predicted)]
    return to_float(small), to_float(painted[0]), to_float(painted[1])


# ------------------------------------------------------------------------------------------------------------- the kind


_USE = {"train": "train", "evaluation": "evaluate"}


def _min_batch_size(config: SegmentConfig) -> int:
    """Fewest images of a device: UperNet normalises over a batch, that of all GPUs where there are several."""
    return 1 if torch.cuda.is_available() and world_size(config) > 1 else 2


def _whole_view(
    image: Tensor,
    mask: Tensor,
    view_key: int,  # noqa: ARG001
    *,
    size: int,
    test: SegmentTestConfig,
) -> dict[str, list[Tensor]]:
    """A held-out image at the test's sizes, and its mask as it is: lists, since sizes differ."""
    return {"images": scaled_pictures(image, size, test), "masks": [mask]}
