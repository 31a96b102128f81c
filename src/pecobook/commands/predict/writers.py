"""What is written for images by each kind of model."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pecobook.analysis.segments import overlay, palette
from pecobook.models.dense.detector import Detections
from pecobook.utils.devices import device
from pecobook.utils.files import write_atomically
from pecobook.utils.images import to_float

if TYPE_CHECKING:
    from PIL import Image

    from pecobook.settings.predict import PredictConfig

_BEST = 5
_BATCH = 16
"""Most images that are classified at once."""
_HELD = 2**28
"""Bytes of whole images after which no more are waited for."""


class ClassifierWriter:
    """predictions.csv: a row an image, its five best classes and their probabilities."""

    def __init__(self, config: PredictConfig, out: Path) -> None:
        from pecobook.models.export import read_export
        from pecobook.models.weights import exported_network

        settings, state = read_export(config.run)
        self.out, self.pictures = out, config.pictures
        self.classes: list[str] = settings["classes"]
        self.network = exported_network(settings, state, config.run).to(device())
        self.size, self.crop = settings["image_size"], settings.get("crop", 1.0)
        self.mean, self.std = (torch.tensor(settings[name], device=device())[:, None, None] for name in ("mean", "std"))
        self.images = 0
        self.count = min(_BEST, len(self.classes))
        self.waiting: list[tuple[str, str, Tensor, Tensor]] = []  # name, file, image, its central square

    def add(self, name: str, file: str, image: Tensor) -> None:
        """Classify the central square of an image, together with those after it."""
        from pecobook.data.views import center_crop

        self.waiting.append((name, file, image, center_crop(image, self.size, share=self.crop)))
        held = sum(waiting.numel() for _, _, waiting, _ in self.waiting)
        if len(self.waiting) == _BATCH or held > _HELD:
            self._classify()

    @torch.inference_mode()
    def _classify(self) -> None:
        batch, self.waiting = self.waiting, []
        squares = to_float(torch.stack([square for *_, square in batch]).to(device()))
        best = self.network((squares - self.mean) / self.std).float().softmax(1).topk(self.count)
        for (name, file, image, _), places, values in zip(
            batch, best.indices.tolist(), best.values.tolist(), strict=True
        ):
            found = [(self.classes[place], f"{value:.5f}") for place, value in zip(places, values, strict=True)]
            self._write([name, *(text for pair in found for text in pair)])
            if self.pictures:
                caption = f"{found[0][0]}  {100 * values[0]:.0f}%"
                _save(captioned(image, caption), self.out / "pictures" / f"{file}.jpg")

    def _write(self, row: list[str]) -> None:
        text = io.StringIO()
        lines = csv.writer(text)
        if not self.images:
            further = ((f"class_{n}", f"probability_{n}") for n in range(2, self.count + 1))
            lines.writerow(["image", "class", "probability", *(name for pair in further for name in pair)])
        lines.writerow(row)
        _append(self.out / "predictions.csv", text.getvalue())
        self.images += 1

    def finish(self) -> str:
        """Classify those that still wait."""
        if self.waiting:
            self._classify()
        return f"predictions.csv: {self.images} images."


class SegmenterWriter:
    """masks/: a palette PNG an image, whose values are the class numbers of classes.txt."""

    def __init__(self, config: PredictConfig, out: Path) -> None:
        from pecobook.models.dense.segmenter import Segmenter

        self.out, self.pictures, self.test = out, config.pictures, config.test
        self.model = Segmenter.from_pretrained(config.run).to(device())
        self.colours = palette(len(self.model.classes))
        self.count = torch.zeros(len(self.model.classes), dtype=torch.int64)
        self.images = 0

    def add(self, name: str, file: str, image: Tensor) -> None:  # noqa: ARG002
        """Segment an image at its own size."""
        from PIL import Image

        classes = self.model.predict(image, self.test)  # (H, W)
        self.count += torch.bincount(classes.flatten(), minlength=len(self.count))
        self.images += 1
        if len(self.count) <= 256:
            mask = Image.fromarray(classes.to(torch.uint8).numpy(), "L")
            mask.putpalette(self.colours.tobytes())
        else:
            mask = Image.fromarray(classes.numpy().astype("uint16"))
        _save(mask, self.out / "masks" / f"{file}.png")
        if self.pictures:
            _save(_picture(overlay(image, classes)), self.out / "pictures" / f"{file}.jpg")

    def finish(self) -> str:
        """Write classes.txt."""
        write_atomically(self.out / "classes.txt", ("\n".join(self.model.classes) + "\n").encode())
        shares = self.count / self.count.sum()
        order = shares.argsort(descending=True)[:5].tolist()
        most = ", ".join(f"{self.model.classes[place]} {100 * float(shares[place]):.0f}%" for place in order)
        return f"masks/: {self.images} masks. Most pixels: {most}."


class DetectorWriter:
    """detections.json in COCO's format of results; images.json says which number an image has."""

    def __init__(self, config: PredictConfig, out: Path) -> None:
        from pecobook.models.dense.detector import Detector

        self.out, self.pictures, self.score = out, config.pictures, config.score
        self.model = Detector.from_pretrained(config.run).to(device())
        self.images = self.found = self.good = 0

    def add(self, name: str, file: str, image: Tensor) -> None:
        """Find the objects of an image."""
        from pecobook.analysis.detections import coco_results

        found = self.model.predict(image)
        height, width = int(image.shape[1]), int(image.shape[2])
        self.images += 1
        results = coco_results(self.images, (height, width), found, self.model.category_ids)
        self.found += len(results)
        self.good += sum(one["score"] >= self.score for one in results)
        own = {"id": self.images, "file_name": name, "width": width, "height": height}
        _append(self.out / "images.jsonl", json.dumps(own) + "\n")
        _append(self.out / "detections.jsonl", "".join(json.dumps(one) + "\n" for one in results))
        if self.pictures:
            _save(
                _picture(with_objects(image, found, self.model.classes, self.score)),
                self.out / "pictures" / f"{file}.jpg",
            )

    def finish(self) -> str:
        """Write detections.json and images.json."""
        pairs = zip(self.model.category_ids, self.model.classes, strict=True)
        categories = [{"id": number, "name": name} for number, name in pairs]
        images, detections = self.out / "images.jsonl", self.out / "detections.jsonl"
        with images.open() as lines:
            listing = {"images": [json.loads(line) for line in lines], "categories": categories}
        write_atomically(self.out / "images.json", (json.dumps(listing, indent=1) + "\n").encode())
        with detections.open("rb") as found:
            write_atomically(self.out / "detections.json", _as_list(found))
        images.unlink()
        detections.unlink()
        return f"detections.json: {self.found} on {self.images} images, {self.good} of them above {self.score:g}."


def with_objects(image: Tensor, found: Detections, classes: Sequence[str], score: float) -> Tensor:
    """A picture uint8 (3, H, W) with boxes, masks, names and scores of what was found with at least `score`."""
    from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

    from pecobook.analysis.detections import colour_of

    found = found.above(score)
    if not len(found.labels):
        return image
    labels = found.labels.tolist()
    colours = [colour_of(label) for label in labels]
    if found.masks is not None:
        image = draw_segmentation_masks(
            image, found.pasted_masks(image.shape[1], image.shape[2]), alpha=0.45, colors=colours
        )
    pairs = zip(labels, found.scores.tolist(), strict=True)
    texts = [f"{classes[label - 1]} {100 * value:.0f}%" for label, value in pairs]
    # torchvision wants boxes that are at least a pixel wide.
    corner = found.boxes[:, :2]
    boxes = torch.cat([corner, torch.maximum(found.boxes[:, 2:], corner + 1)], 1)
    line = max(min(image.shape[1:]) // 250, 1)
    return draw_bounding_boxes(image, boxes, labels=texts, colors=colours, width=line)  # type: ignore[no-any-return]


def captioned(image: Tensor, text: str) -> Image.Image:
    """A picture with a line of text under it."""
    from PIL import Image, ImageDraw, ImageFont

    picture = _picture(image)
    size = max(min(picture.width // 24, 40), 12)
    font = ImageFont.load_default(size)
    whole = Image.new("RGB", (max(picture.width, 8 * size), picture.height + 2 * size), "white")
    whole.paste(picture, (0, 0))
    ImageDraw.Draw(whole).text((size // 2, picture.height + size // 3), text, fill="black", font=font)
    return whole


def _append(file: Path, text: str) -> None:
    with file.open("a", encoding="utf-8", newline="") as lines:
        lines.write(text)


def _as_list(lines: Iterable[bytes]) -> Iterator[bytes]:
    """One JSON list of the values on lines, never all of them in memory."""
    yield b"["
    for number, line in enumerate(lines):
        yield (b", " if number else b"") + line.rstrip(b"\n")
    yield b"]"


def _picture(image: Tensor) -> Image.Image:
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _save(picture: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if file.suffix == ".png" else "JPEG", quality=92)
    write_atomically(file, buffer.getvalue())
