"""Writers: predict images with each kind of model and write the predictions."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pecobook.analysis.detections import coco_results, colour_of
from pecobook.analysis.segments import overlay, palette
from pecobook.commands.predict.sources import Sources, list_clips, list_images
from pecobook.data.clips import central_clip, central_crops
from pecobook.data.decode import BadImage
from pecobook.data.views import center_crop, central_view, shortest_side
from pecobook.errors import counted, first_line
from pecobook.models.dense.detector import Detections, Detector
from pecobook.models.dense.segmenter import Segmenter
from pecobook.models.video import ClipClassifier
from pecobook.models.weights import Classifier
from pecobook.settings.predict import PredictConfig
from pecobook.utils.devices import device
from pecobook.utils.files import write_atomically
from pecobook.utils.images import encode_picture, to_pillow

_NUM_BEST = 5
"""Number of classes written for each image."""
_BATCH = 16
"""Maximum number of images in a batch of the classifier."""
_MAX_JPEG_SIDE = 65_500
"""Longest side of a JPEG, in pixels."""
_MAX_BYTES = 2**28
"""A batch is classified early if the images waiting for it take more bytes than this."""


class Writer:
    """Predicts with one kind of model, and writes the predictions."""

    shortest = 0
    """The shorter side, in pixels, that large images keep, see `decode`; 0 if the writer needs the whole image."""

    def __init__(self, config: PredictConfig, out: Path) -> None:
        self.out, self.pictures, self.num_images = out, config.pictures, 0

    def sources(self, source: str) -> Sources:
        """Open the images, or whatever else the model reads, of a source. Raises DataError."""
        return list_images(source)

    def add(self, name: str, file: str, image: Tensor) -> None:
        """Predict the image `name`, uint8 (3, H, W), or the frames (T, 3, H, W) of a clip, and write its files.

        `file` is the relative path of these, without an extension. Raises BadImage if the network fails.
        """
        raise NotImplementedError

    def finish(self) -> str:
        """Write the files on all images; return a text on what was written."""
        raise NotImplementedError


class ClassifierWriter(Writer):
    """Writes predictions.csv: a row per image with the five best classes and their probabilities."""

    kind: type[Classifier] = Classifier
    unit = "images"
    view: Any = staticmethod(central_view)
    """The evaluation view from training, which says how far large images may be reduced."""

    def __init__(self, config: PredictConfig, out: Path) -> None:
        super().__init__(config, out)
        self.model = self.kind.from_pretrained(config.run).to(device())
        self.square: dict[str, Any] = {"size": self.model.image_size, "share": self.model.crop}
        self.shortest = 0 if self.pictures else shortest_side(partial(self.view, **self.square))
        self.num_best = min(_NUM_BEST, len(self.model.classes))
        self.waiting: list[tuple[str, str, Tensor, Tensor]] = []  # name, file, image, central square of the image

    def add(self, name: str, file: str, image: Tensor) -> None:
        """Put the central square of an image into the batch; a full batch is classified and written."""
        self._wait(name, file, image, center_crop(image, **self.square))

    def _wait(self, name: str, file: str, image: Tensor, square: Tensor) -> None:
        self.waiting.append((name, file, image, square))
        num_bytes = sum(waiting.numel() for _, _, waiting, _ in self.waiting)
        if len(self.waiting) == _BATCH or num_bytes > _MAX_BYTES:
            self._classify()

    @torch.inference_mode()
    def _classify(self) -> None:
        batch, self.waiting = self.waiting, []
        squares = torch.stack([square for *_, square in batch]).to(device())
        best = self.model(squares).float().softmax(1).topk(self.num_best)
        for (name, file, image, _), indices, values in zip(
            batch, best.indices.tolist(), best.values.tolist(), strict=True
        ):
            pairs = [(self.model.classes[index], f"{value:.5f}") for index, value in zip(indices, values, strict=True)]
            self._write([name, *(text for pair in pairs for text in pair)])
            if self.pictures:
                caption = f"{pairs[0][0]}  {100 * values[0]:.0f}%"
                _save(captioned(image, caption), self.out / "pictures" / f"{file}.jpg")

    def _write(self, row: list[str]) -> None:
        text = io.StringIO()
        writer = csv.writer(text)
        if not self.num_images:
            pairs = ((f"class_{n}", f"probability_{n}") for n in range(2, self.num_best + 1))
            writer.writerow([self.unit[:-1], "class", "probability", *(name for pair in pairs for name in pair)])
        writer.writerow(row)
        _append(self.out / "predictions.csv", text.getvalue())
        self.num_images += 1

    def finish(self) -> str:
        """Classify the images that are still waiting."""
        if self.waiting:
            self._classify()
        return f"predictions.csv: {counted(self.num_images, self.unit)}."


class ClipWriter(ClassifierWriter):
    """Writes what `ClassifierWriter` writes, for clips; a picture is the middle frame."""

    kind = ClipClassifier
    unit = "clips"
    view = staticmethod(central_clip)
    model: ClipClassifier

    def sources(self, source: str) -> Sources:
        """Open the clips of a source, read as the frames of evaluation."""
        return list_clips(source, self.model.clip)

    def add(self, name: str, file: str, image: Tensor) -> None:
        """Put the squares of the frames (T, 3, H, W) of a clip into the batch."""
        squares = central_crops(image, self.model.clip, **self.square)
        self._wait(name, file, image[len(image) // 2].clone(), squares)  # a view would keep all frames


class SegmenterWriter(Writer):
    """Writes masks/: a palette PNG per image, whose pixel values are the class numbers of classes.txt."""

    def __init__(self, config: PredictConfig, out: Path) -> None:
        super().__init__(config, out)
        self.test = config.test
        self.model = Segmenter.from_pretrained(config.run).to(device())
        self.colours = palette(len(self.model.classes))
        self.pixel_counts = torch.zeros(len(self.model.classes), dtype=torch.int64)

    def add(self, name: str, file: str, image: Tensor) -> None:
        """Segment an image at its own size."""
        with _skip_failure(name):
            classes = self.model.predict(image, self.test)  # (H, W)
        self.pixel_counts += torch.bincount(classes.flatten(), minlength=len(self.pixel_counts))
        self.num_images += 1
        if len(self.pixel_counts) <= 256:
            mask = Image.fromarray(classes.to(torch.uint8).numpy(), "L")
            mask.putpalette(self.colours.tobytes())
        else:
            mask = Image.fromarray(classes.numpy().astype("uint16"))
        _save(mask, self.out / "masks" / f"{file}.png")
        if self.pictures:
            _save(to_pillow(overlay(image, classes)), self.out / "pictures" / f"{file}.jpg")

    def finish(self) -> str:
        """Write classes.txt."""
        write_atomically(self.out / "classes.txt", ("\n".join(self.model.classes) + "\n").encode())
        shares = self.pixel_counts / self.pixel_counts.sum()
        largest = shares.argsort(descending=True)[:5].tolist()
        texts = [f"{self.model.classes[number]} {100 * float(shares[number]):.0f}%" for number in largest]
        return f"masks/: {self.num_images} masks. Most pixels: {', '.join(texts)}."


class DetectorWriter(Writer):
    """Writes detections.json in COCO's format of results, and images.json with the number of each image."""

    def __init__(self, config: PredictConfig, out: Path) -> None:
        super().__init__(config, out)
        self.score = config.score
        self.model = Detector.from_pretrained(config.run).to(device())
        self.num_detections = self.num_above_score = 0

    def add(self, name: str, file: str, image: Tensor) -> None:
        """Detect the objects in an image."""
        with _skip_failure(name):
            detections = self.model.predict(image)
        height, width = int(image.shape[1]), int(image.shape[2])
        self.num_images += 1
        results = coco_results(self.num_images, (height, width), detections, self.model.category_ids)
        self.num_detections += len(results)
        self.num_above_score += sum(result["score"] >= self.score for result in results)
        description = {"id": self.num_images, "file_name": name, "width": width, "height": height}
        _append(self.out / "images.jsonl", json.dumps(description) + "\n")
        _append(self.out / "detections.jsonl", "".join(json.dumps(result) + "\n" for result in results))
        if self.pictures:
            drawn = with_objects(image, detections, self.model.classes, self.score)
            _save(to_pillow(drawn), self.out / "pictures" / f"{file}.jpg")

    def finish(self) -> str:
        """Write detections.json and images.json."""
        pairs = zip(self.model.category_ids, self.model.classes, strict=True)
        categories = [{"id": number, "name": name} for number, name in pairs]
        images, detections = self.out / "images.jsonl", self.out / "detections.jsonl"
        with images.open() as lines:
            listing = {"images": [json.loads(line) for line in lines], "categories": categories}
        write_atomically(self.out / "images.json", (json.dumps(listing, indent=1) + "\n").encode())
        with detections.open("rb") as lines:
            write_atomically(self.out / "detections.json", _as_json_list(lines))
        images.unlink()
        detections.unlink()
        return (
            f"detections.json: {self.num_detections} on {self.num_images} images, "
            f"{self.num_above_score} of them above {self.score:g}."
        )


def with_objects(image: Tensor, detections: Detections, classes: Sequence[str], score: float) -> Tensor:
    """Draw boxes, masks, names and scores of all detections with at least `score` on an image uint8 (3, H, W)."""
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    detections = detections.above(score)
    if not len(detections.labels):
        return image
    labels = detections.labels.tolist()
    colours = [colour_of(label) for label in labels]
    if detections.masks is not None:
        image = draw_segmentation_masks(
            image, detections.pasted_masks(image.shape[1], image.shape[2]), alpha=0.45, colors=colours
        )
    pairs = zip(labels, detections.scores.tolist(), strict=True)
    texts = [f"{classes[label - 1]} {100 * value:.0f}%" for label, value in pairs]
    # torchvision draws only boxes that are at least one pixel wide and high.
    corners = detections.boxes[:, :2]
    boxes = torch.cat([corners, torch.maximum(detections.boxes[:, 2:], corners + 1)], 1)
    line_width = max(min(image.shape[1:]) // 250, 1)
    return draw_bounding_boxes(image, boxes, labels=texts, colors=colours, width=line_width)  # type: ignore[no-any-return]


def captioned(image: Tensor, text: str) -> Image.Image:
    """Return the image with a line of text below."""
    picture = to_pillow(image)
    size = max(min(picture.width // 24, 40), 12)
    font = ImageFont.load_default(size)
    canvas = Image.new("RGB", (max(picture.width, 8 * size), picture.height + 2 * size), "white")
    canvas.paste(picture, (0, 0))
    ImageDraw.Draw(canvas).text((size // 2, picture.height + size // 3), text, fill="black", font=font)
    return canvas


@contextlib.contextmanager
def _skip_failure(name: str) -> Iterator[None]:
    """Raise BadImage if a network fails on one image, for example for lack of memory; others may succeed."""
    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as error:
        raise BadImage(name, f"cannot be predicted: {first_line(error)}") from error


def _append(file: Path, text: str) -> None:
    with file.open("a", encoding="utf-8", newline="") as lines:
        lines.write(text)


def _as_json_list(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the parts of a JSON list of the values on the lines; only one line is in memory at a time."""
    yield b"["
    for number, line in enumerate(lines):
        yield (b", " if number else b"") + line.rstrip(b"\n")
    yield b"]"


def _save(picture: Image.Image, file: Path) -> None:
    """Write a PNG or a JPEG, scaled down if a side exceeds what the format can hold."""
    if file.suffix != ".png" and max(picture.size) > _MAX_JPEG_SIDE:
        picture.thumbnail((_MAX_JPEG_SIDE, _MAX_JPEG_SIDE))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, encode_picture(picture, "PNG" if file.suffix == ".png" else "JPEG", quality=92))
