"""Object detection and instance masks on a backbone (PeCo section 4): Mask R-CNN on its feature pyramid."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pecobook.data.batch import Batch
from pecobook.data.dense.detection import DetectionSource, open_detection
from pecobook.data.dense.detection_views import evaluation_view, training_view
from pecobook.data.source import ImageSource, Splits
from pecobook.data.stream import ViewFunction
from pecobook.engine.launch import is_leader
from pecobook.engine.optim import dense_groups
from pecobook.engine.stage import Stage, StageOutput
from pecobook.errors import ConfigError
from pecobook.models.dense.detector import Detections, Detector, rescale
from pecobook.models.dense.pyramid import FeaturePyramid, describe_pyramid, pyramid_of
from pecobook.models.weights import Backbone
from pecobook.settings.detect import DetectConfig
from pecobook.settings.training import BaseOptimConfig

_DRAWN = 4  # images in samples/detections.png
_DRAWN_SCORE = 0.3


class DetectStage(Stage[DetectConfig]):
    """A detector, its losses, and how well it finds what is on the held-out images.

    Args:
        config: all settings.
        train: the images to learn from.
        evaluation: the held-out ones.
        opened: what `pyramid_of` gives; None opens it.
    """

    command = "detect"

    def __init__(
        self,
        config: DetectConfig,
        train: DetectionSource,
        evaluation: DetectionSource,
        opened: tuple[FeaturePyramid, Backbone] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.evaluation = config, evaluation
        pyramid, backbone = opened or pyramid_of(config)
        self.detector = Detector(
            pyramid,
            describe_pyramid(backbone, config.pyramid, config.image_size),
            classes=train.classes,
            category_ids=train.category_ids,
            masks=train.has_masks,
            sides=config.sides,
            config=config.detector,
        )
        self._results: list[dict[str, Any]] = []  # of the last evaluation, for its report
        self._precision: dict[str, float] = {}

    def forward(self, batch: Batch) -> StageOutput:
        """The sum of the detector's losses; in evaluation mode what it finds, in pixels of the original image."""
        images = batch["images"]
        if self.training:
            losses: dict[str, Tensor] = self.detector(images, _targets(batch))
            metrics = {f"loss_{name}": loss.detach() for name, loss in losses.items()}
            return StageOutput(torch.stack(list(losses.values())).sum(), metrics)
        # One by one: beside a larger image one is padded, and a ViT would see that.
        found: list[Detections] = [self.detector([image])[0] for image in images]
        rows = [
            _row(one, (image.shape[1], image.shape[2]), (int(size[0]), int(size[1])), self.config.detector.detections)
            for one, image, size in zip(found, images, batch["size"], strict=True)
        ]
        whole = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return StageOutput(None, {}, rows={"index": batch["index"], **whole})

    def parameter_groups(self, config: BaseOptimConfig) -> list[dict[str, Any]]:
        """Groups for the optimizer, with rates by layer of the backbone."""
        own = self.detector
        above = (own.pyramid.scale, own.fpn, own.proposals, own.heads)
        return dense_groups(own.pyramid.network, above, config, frozen=self.config.pyramid.frozen)

    def summarise(self, rows: dict[str, Tensor], known: dict[str, Tensor]) -> dict[str, float]:
        """Average precision over all held-out images, in percent."""
        from pecobook.analysis.detections import evaluate_detections

        count = self.config.detector.detections
        self._precision, self._results = evaluate_detections(self.evaluation, _unpack(rows), detections=count)
        return {name: value for name, value in self._precision.items() if "ar_" not in name}

    def report(self, folder: Path, rows: dict[str, Tensor], source: ImageSource) -> None:
        """Write detections.json (COCO's format of results), average_precision.json, and images with both sides."""
        from pecobook.utils.files import write_atomically

        write_atomically(folder / "detections.json", (json.dumps(self._results) + "\n").encode())
        write_atomically(folder / "average_precision.json", (json.dumps(self._precision, indent=2) + "\n").encode())
        picture = self._picture(rows)
        if picture:
            (folder / "samples").mkdir(exist_ok=True)
            write_atomically(folder / "samples" / "detections.png", picture)

    def _picture(self, rows: dict[str, Tensor]) -> bytes:
        from pecobook.analysis.detections import detections_picture
        from pecobook.data.decode import BadImage

        labelled, detected = [], []
        for index, found in _unpack(rows):
            try:
                image, objects = self.evaluation.sample(index)
            except BadImage:
                continue
            certain = torch.ones(len(objects.labels))
            labelled.append((image, Detections(objects.boxes, certain, objects.labels, objects.masks())))
            detected.append((image, found.above(_DRAWN_SCORE)))
            if len(labelled) == _DRAWN:
                break
        if not labelled:
            return b""
        return detections_picture({"labelled": labelled, "detected": detected}, self.detector.classes)

    def export(self, folder: Path, state: dict[str, Tensor]) -> str:
        """Write the detector."""
        own = {name.removeprefix("detector."): value for name, value in state.items()}
        self.detector.save_pretrained(folder, state=own)
        return self.detector.lines(self.config.out)

    @classmethod
    def open(cls, config: DetectConfig) -> Splits:
        """The source; what was mended in it is told."""
        splits = open_detection(config.data, skip_bad=config.skip_bad, masks=config.masks)
        if is_leader():
            for note in cast("DetectionSource", splits.train).notes:
                print(note, file=sys.stderr)
        return splits

    @classmethod
    def check(cls, config: DetectConfig) -> tuple[FeaturePyramid, Backbone]:
        """The pyramid and its backbone. Raises PecobookError for settings, or weights, that cannot be used."""
        if config.compile:
            raise ConfigError("--compile does not go with detect: the number of objects differs from image to image.")
        return pyramid_of(config)

    @classmethod
    def build(
        cls, config: DetectConfig, splits: Splits, made: tuple[FeaturePyramid, Backbone] | None = None
    ) -> DetectStage:
        """The stage, with random heads."""
        train, evaluation = cast("DetectionSource", splits.train), cast("DetectionSource", splits.evaluation)
        return cls(config, train, evaluation, made)

    @classmethod
    def view(cls, config: DetectConfig) -> ViewFunction:
        """What training reads of an image."""
        return partial(
            training_view,
            scales=config.scales,
            max_size=config.max_size,
            jitter=config.jitter,
            canvas=config.image_size if config.jitter else 0,
        )

    @classmethod
    def evaluation_view(cls, config: DetectConfig) -> ViewFunction:
        """What evaluation reads of a held-out image."""
        short, long = config.sides
        return partial(evaluation_view, short=short, long=long)


def _targets(batch: Batch) -> list[dict[str, Tensor]]:
    """Boxes float32 (n, 4), labels int64 (n,) and, where there are any, masks uint8 (n, h, w), of each image."""
    parts = {"boxes": batch["boxes"], "labels": batch["labels"]}
    if "masks" in batch:
        parts["masks"] = batch["masks"]
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def _row(found: Detections, view: tuple[int, int], size: tuple[int, int], count: int) -> dict[str, Tensor]:
    """Detections as tensors of `count` entries, those without a score being none; boxes in the image's own pixels."""
    missing = count - len(found.scores)
    row = {
        "boxes": F.pad(rescale(found.boxes, view, size), (0, 0, 0, missing)),
        "scores": F.pad(found.scores, (0, missing)),
        "labels": F.pad(found.labels, (0, missing)),
    }
    if found.masks is not None:
        row["masks"] = F.pad((found.masks * 255).round().to(torch.uint8), (0, 0, 0, 0, 0, missing))
    return row


def _unpack(rows: dict[str, Tensor]) -> Iterator[tuple[int, Detections]]:
    """Numbers of images and what was found on them, every image once, in order of their numbers."""
    index = rows["index"].tolist()
    places = {number: place for place, number in reversed(list(enumerate(index)))}
    for number, place in sorted(places.items()):
        count = int((rows["scores"][place] > 0).sum())
        masks = rows["masks"][place, :count].float() / 255 if "masks" in rows else None
        boxes, scores, labels = (rows[name][place, :count] for name in ("boxes", "scores", "labels"))
        yield number, Detections(boxes, scores, labels, masks)
