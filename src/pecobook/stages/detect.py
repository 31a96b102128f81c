"""Object detection and instance masks (PeCo section 4): Mask R-CNN on a backbone's feature pyramid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pecobook.analysis.detections import detections_picture, evaluate_detections
from pecobook.data.batch import Batch
from pecobook.data.decode import BadImage
from pecobook.data.dense.detection import DetectionSource, open_detection
from pecobook.data.dense.views import detection_test_view, detection_view
from pecobook.data.source import ImageSource, Splits
from pecobook.data.stream import ViewFunction
from pecobook.engine.optim import dense_groups
from pecobook.engine.stage import Stage, StageOutput, submodule_state
from pecobook.models.dense.detector import Detections, Detector, rescale_boxes
from pecobook.models.dense.pyramid import FeaturePyramid, build_pyramid, describe_pyramid
from pecobook.models.initial import start_dense
from pecobook.models.weights import Backbone
from pecobook.settings.detect import DetectConfig
from pecobook.settings.training import BaseOptimConfig
from pecobook.utils.files import write_atomically, write_json

_NUM_PICTURES = 4  # images in samples/detections.png
_MIN_DRAWN_SCORE = 0.3


class DetectStage(Stage[DetectConfig]):
    """A detector, its losses, and its average precision on the held-out images.

    Four of the five losses are means over equally many anchors or proposals per image (256, `--detector.samples`), so
    they do not depend on how a step is split. The mask loss is a mean over a micro-batch's regions with an object, as
    in torchvision, so with accumulation an image counts more for it next to an image with few objects. The number of
    these regions in the whole step is known only after a forward pass over all its parts.

    Args:
        config: all settings.
        train: the training images.
        evaluation: the held-out images.
        networks: the feature pyramid of the settings and its backbone; None builds them.
    """

    command = "detect"
    has_one_size = False

    def __init__(
        self,
        config: DetectConfig,
        train: DetectionSource,
        evaluation: DetectionSource,
        networks: tuple[FeaturePyramid, Backbone] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.evaluation = config, evaluation
        pyramid, backbone = networks or build_pyramid(config)
        self.detector = Detector(
            pyramid,
            describe_pyramid(backbone, config.pyramid, config.image_size),
            classes=train.classes,
            category_ids=train.category_ids,
            masks=train.has_masks,
            sides=config.sides,
            config=config.detector,
        )
        start = start_dense(self.detector, config.init, "detector", train.classes)
        self.notes, self.detector.init = (*start.notes, *backbone.notes), start.summary
        self._results: list[dict[str, Any]] = []  # results of the last evaluation, for `report`
        self._precision: dict[str, float] = {}

    def forward(self, batch: Batch) -> StageOutput:
        """Return the sum of the detector's losses; in evaluation mode detections, in pixels of the original image."""
        images = batch["images"]
        if self.training:
            losses: dict[str, Tensor] = self.detector(images, _targets(batch))
            metrics = {f"loss_{name}": loss.detach() for name, loss in losses.items()}
            return StageOutput(torch.stack(list(losses.values())).sum(), metrics)
        rows = []
        for image, size in zip(images, batch["size"], strict=True):
            # Images pass one by one: in a batch smaller images are padded, and a ViT would see the padding.
            detections: Detections = self.detector([image])[0]
            view, original = (image.shape[1], image.shape[2]), (int(size[0]), int(size[1]))
            rows.append(detections_to_row(detections, view, original, self.config.detector.detections))
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return StageOutput(None, {}, rows={"index": batch["index"], **stacked})

    def parameter_groups(self, config: BaseOptimConfig) -> list[dict[str, Any]]:
        """Return parameter groups: layer-wise learning rates in the backbone, the full rate elsewhere."""
        detector = self.detector
        heads = (detector.pyramid.scale, detector.fpn, detector.proposals, detector.heads)
        return dense_groups(detector.pyramid.network, heads, config, frozen=self.config.pyramid.frozen)

    def summarise(self, rows: dict[str, Tensor], reference_rows: dict[str, Tensor]) -> dict[str, float]:
        """Return the average precision over all held-out images, in percent."""
        count = self.config.detector.detections
        self._precision, self._results = evaluate_detections(
            self.evaluation, rows_to_detections(rows), max_detections=count
        )
        return {name: value for name, value in self._precision.items() if "ar_" not in name}

    def report(self, folder: Path, rows: dict[str, Tensor], source: ImageSource) -> None:
        """Write detections.json (COCO's results format), average_precision.json, and pictures of labels and results."""
        write_atomically(folder / "detections.json", (json.dumps(self._results) + "\n").encode())
        write_json(folder / "average_precision.json", self._precision)
        picture = self._picture(rows)
        if picture:
            (folder / "samples").mkdir(exist_ok=True)
            write_atomically(folder / "samples" / "detections.png", picture)

    def _picture(self, rows: dict[str, Tensor]) -> bytes:
        labelled, detected = [], []
        for index, detections in rows_to_detections(rows):
            try:
                image, objects = self.evaluation.sample(index)
            except BadImage:
                continue
            scores = torch.ones(len(objects.labels))
            labelled.append((image, Detections(objects.boxes, scores, objects.labels, objects.masks())))
            detected.append((image, detections.above(_MIN_DRAWN_SCORE)))
            if len(labelled) == _NUM_PICTURES:
                break
        if not labelled:
            return b""
        return detections_picture({"labelled": labelled, "detected": detected}, self.detector.classes)

    def export(self, folder: Path, state: dict[str, Tensor]) -> str:
        """Write the detector."""
        self.detector.value_range = self.config.value_range
        self.detector.save_pretrained(folder, state=submodule_state(state, "detector"))
        return self.detector.loading_code(self.config.out)

    @classmethod
    def open(cls, config: DetectConfig) -> Splits:
        """Open the images and their objects."""
        return open_detection(config.data, skip_bad=config.skip_bad, masks=config.masks)

    @classmethod
    def check(cls, config: DetectConfig) -> tuple[FeaturePyramid, Backbone]:
        """Build the pyramid and its backbone. Raises PecobookError for unusable settings or weights."""
        return build_pyramid(config)

    @classmethod
    def build(
        cls, config: DetectConfig, splits: Splits, prebuilt: tuple[FeaturePyramid, Backbone] | None = None
    ) -> DetectStage:
        """Build the stage, with random weights in the heads."""
        train, evaluation = cast("DetectionSource", splits.train), cast("DetectionSource", splits.evaluation)
        return cls(config, train, evaluation, prebuilt)

    @classmethod
    def view(cls, config: DetectConfig) -> ViewFunction:
        """Return the function that resizes, crops and flips an image with its objects."""
        return partial(
            detection_view,
            scales=config.scales,
            max_size=config.max_size,
            jitter=config.jitter,
            canvas=config.image_size if config.jitter else 0,
        )

    @classmethod
    def evaluation_view(cls, config: DetectConfig) -> ViewFunction:
        """Return the function that resizes a held-out image."""
        short, long = config.sides
        return partial(detection_test_view, short=short, long=long)


def _targets(batch: Batch) -> list[dict[str, Tensor]]:
    """Return boxes float32 (n, 4), labels int64 (n,) and, if the data has masks, uint8 (n, h, w), for each image."""
    parts = {"boxes": batch["boxes"], "labels": batch["labels"]}
    if "masks" in batch:
        parts["masks"] = batch["masks"]
    return [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]


def detections_to_row(
    detections: Detections, view: tuple[int, int], size: tuple[int, int], count: int
) -> dict[str, Tensor]:
    """Pad detections to `count` entries, adding ones with score 0; boxes become pixels of the original image."""
    missing = count - len(detections.scores)
    row = {
        "boxes": F.pad(rescale_boxes(detections.boxes, view, size), (0, 0, 0, missing)),
        "scores": F.pad(detections.scores, (0, missing)),
        "labels": F.pad(detections.labels, (0, missing)),
    }
    if detections.masks is not None:
        row["masks"] = F.pad((detections.masks * 255).round().to(torch.uint8), (0, 0, 0, 0, 0, missing))
    return row


def rows_to_detections(rows: dict[str, Tensor]) -> Iterator[tuple[int, Detections]]:
    """Yield the number and detections of every image once, in numerical order."""
    index = rows["index"].tolist()
    first_rows = {number: row for row, number in reversed(list(enumerate(index)))}
    for number, row in sorted(first_rows.items()):
        count = int((rows["scores"][row] > 0).sum())
        masks = rows["masks"][row, :count].float() / 255 if "masks" in rows else None
        boxes, scores, labels = (rows[name][row, :count] for name in ("boxes", "scores", "labels"))
        yield number, Detections(boxes, scores, labels, masks)
