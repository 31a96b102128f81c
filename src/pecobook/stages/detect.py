"""Object detection and instance masks on a backbone (PeCo section 4): Mask R-CNN on its feature pyramid."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pecobook.config import OptimConfig, TrainConfig, between, positive
from pecobook.data.detection import DetectionSource, open_detection
from pecobook.data.detection_views import evaluation_view, training_view
from pecobook.data.source import ImageSource, Splits
from pecobook.data.stream import Batch, ViewFunction
from pecobook.engine.launch import is_leader
from pecobook.engine.loop import StageOutput
from pecobook.engine.optim import dense_groups
from pecobook.errors import ConfigError
from pecobook.models.detector import Detections, Detector, DetectorConfig, export_detector, rescale
from pecobook.models.pyramid import PyramidConfig, describe_pyramid, pyramid_of
from pecobook.stages.stage import Stage, StageKind

_DRAWN = 4  # images in samples/detections.png
_DRAWN_SCORE = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectConfig(TrainConfig):
    """Train a detector of boxes and masks on a backbone."""

    data: str = ""
    """Images and objects in COCO's format: a folder with train/instances.json and train/images/, and the same for val;
    or, as COCO's own, annotations/instances_train2017.json and train2017/."""
    skip_bad: bool = False
    """Leave out images and objects that cannot be used, instead of refusing them."""
    masks: bool = True
    """Learn masks, where the objects have any."""
    backbone: str = ""
    """A pretrain, contrast or finetune run, or timm:NAME."""
    weights: str = ""
    """A local file of weights, or random to train from scratch; empty takes the backbone's own."""
    drop_path: float = 0.1
    """Stochastic depth: probability of skipping the last block; the first ones less."""
    pyramid: PyramidConfig = PyramidConfig()
    detector: DetectorConfig = DetectorConfig()
    scales: tuple[int, ...] = (800,)
    """Lengths of an image's short side in pixels, one of which is drawn; evaluation takes the largest."""
    max_size: int = 1333
    """Longest side of an image, pixels."""
    jitter: tuple[float, ...] = ()
    """Large-scale jitter (arXiv 2012.07177) in place of --scales: two numbers, the smallest and the largest size of an
    image as a share of --image-size, the side of the square that is cut out of it or padded to. For example 0.1 2.0."""
    image_size: int = 1344
    """Side of the images that the backbone's positions are made for, pixels: the longest side, or that of --jitter."""
    evaluation_images: int = 5000
    """Most held-out images looked at in each evaluation."""
    optim: OptimConfig = OptimConfig(
        lr=4e-4, layer_decay=0.75, warmup="500", schedule="steps", milestones=("8 epochs", "11 epochs")
    )
    max_steps: str = "12 epochs"
    """Length of the training: steps, "N epochs" or "N images"."""
    batch_size: int = 16
    """Images in one optimizer step, over all devices and accumulation steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        between(self, 0.0, 1.0, "drop_path")
        positive(self, "max_size")
        if not self.scales or min(self.scales) <= 0:
            raise ConfigError(f"--scales takes one or more lengths above 0, not {self.scales}.")
        if self.jitter and not (len(self.jitter) == 2 and 0 < self.jitter[0] <= self.jitter[1]):
            raise ConfigError(f"--jitter takes two numbers above 0, the smaller one first, not {self.jitter}.")

    @property
    def sides(self) -> tuple[int, int]:
        """Short and longest side of an image in evaluation."""
        return (self.image_size, self.image_size) if self.jitter else (max(self.scales), self.max_size)


class DetectStage(Stage):
    """A detector, its losses, and how well it finds what is on the held-out images.

    Args:
        config: all settings.
        train: the images to learn from.
        evaluation: the held-out ones.
    """

    def __init__(self, config: DetectConfig, train: DetectionSource, evaluation: DetectionSource) -> None:
        super().__init__()
        self.config, self.evaluation = config, evaluation
        pyramid, backbone = pyramid_of(config)
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
        images = batch["image"]
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

    def parameter_groups(self, config: OptimConfig) -> list[dict[str, Any]]:
        """Groups for the optimizer, with rates by layer of the backbone."""
        own = self.detector
        above = (own.pyramid.scale, own.fpn, own.proposals, own.heads)
        return dense_groups(own.pyramid.network, above, config, frozen=self.config.pyramid.frozen)

    def summarise(self, rows: dict[str, Tensor], known: dict[str, Tensor]) -> dict[str, float]:  # noqa: ARG002
        """Average precision over all held-out images, in percent."""
        from pecobook.analysis.detections import evaluate_detections

        count = self.config.detector.detections
        self._precision, self._results = evaluate_detections(self.evaluation, _unpack(rows), detections=count)
        return {name: value for name, value in self._precision.items() if "ar_" not in name}

    def report(self, folder: Path, rows: dict[str, Tensor], source: ImageSource) -> None:  # noqa: ARG002
        """Write detections.json (COCO's format of results), average_precision.json, and images with both sides."""
        from pecobook.files import write_atomically

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
        return export_detector(folder, own, self.detector)


def _targets(batch: Batch) -> list[dict[str, Tensor]]:
    """Boxes float32 (n, 4), labels int64 (n,) and, where there are any, masks uint8 (n, h, w), of each image."""
    names = [name for name in ("boxes", "labels", "masks") if name in batch]
    return [{name: batch[name][number] for name in names} for number in range(len(batch["boxes"]))]


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


def _check(config: DetectConfig) -> None:
    if config.compile:
        raise ConfigError("--compile does not go with detect: the number of objects differs from image to image.")
    pyramid_of(config)


def _open(config: DetectConfig) -> Splits:
    """The source; what was mended in it is told."""
    splits = open_detection(config.data, skip_bad=config.skip_bad, masks=config.masks)
    if is_leader():
        for note in cast("DetectionSource", splits.train).notes:
            print(note, file=sys.stderr)
    return splits


def _build(config: DetectConfig, splits: Splits) -> DetectStage:
    train, evaluation = cast("DetectionSource", splits.train), cast("DetectionSource", splits.evaluation)
    return DetectStage(config, train, evaluation)


def _view(config: DetectConfig) -> ViewFunction:
    return partial(
        training_view,
        scales=config.scales,
        max_size=config.max_size,
        jitter=config.jitter,
        canvas=config.image_size if config.jitter else 0,
    )


def _evaluation_view(config: DetectConfig) -> ViewFunction:
    short, long = config.sides
    return partial(evaluation_view, short=short, long=long)


KIND: StageKind[DetectConfig] = StageKind("detect", _check, _build, _view, _evaluation_view, open=_open)
