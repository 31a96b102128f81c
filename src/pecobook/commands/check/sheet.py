"""The contact sheet: samples of a source with their labels, masks and boxes drawn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor

from pecobook.analysis.detections import colour_of
from pecobook.analysis.segments import overlay
from pecobook.data.decode import BadImage
from pecobook.data.dense.detection import DetectionSource, Objects
from pecobook.data.dense.segmentation import SegmentationSource
from pecobook.data.dense.segmentation_classes import IGNORE
from pecobook.data.source import ImageSource, Splits
from pecobook.data.summary import short
from pecobook.utils.images import encode_picture, resize, to_pillow

_SIDE = 224  # side of a cell, pixels
_CAPTION = 16
_MAX_NAMED = 12  # more names on an image would hide it


def contact_sheet(splits: Splits, count: int) -> bytes:
    """Return a PNG with at most `count` training images, spread over the classes if there are labels."""
    cells = [cell for index in chosen_images(splits.train, count) if (cell := _cell(splits.train, index)) is not None]
    columns = min(max(math.ceil(math.sqrt(1.5 * len(cells))), 1), 12)
    rows = max(math.ceil(len(cells) / columns), 1)
    sheet = Image.new("RGB", (columns * (_SIDE + 4), rows * (_SIDE + _CAPTION + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption) in enumerate(cells):
        left, top = number % columns * (_SIDE + 4) + 2, number // columns * (_SIDE + _CAPTION + 4) + 2
        sheet.paste(picture, (left + (_SIDE - picture.width) // 2, top + (_SIDE - picture.height) // 2))
        draw.text((left, top + _SIDE + 2), caption, fill="black")
    return encode_picture(sheet, "PNG")


def chosen_images(source: ImageSource, count: int) -> list[int]:
    """Return the indices of at most `count` images: evenly spaced or, with labels, from each class in turn."""
    count = min(count, len(source))
    if source.labels is None:
        return [number * len(source) // count for number in range(count)]
    order = np.argsort(source.labels, kind="stable")
    starts = np.r_[0, np.flatnonzero(np.diff(source.labels[order])) + 1]
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)]))
    # The first image of each class comes before the second image of any class.
    chosen = order[np.lexsort((source.labels[order], rank))][:count]
    return sorted(chosen.tolist(), key=lambda index: (int(source.labels[index]), index))  # type: ignore[index]


def _cell(source: ImageSource, index: int) -> tuple[Image.Image, str] | None:
    """Return an image's picture and caption; None if it cannot be read."""
    name = source.identify(index).rpartition("/")[2]
    try:
        image = source.read(index)
        if isinstance(source, SegmentationSource):
            values, _ = source.read_values(index)
            classes = torch.from_numpy(source.mask_classes.table()[values].clip(IGNORE))  # unknown values too
            if classes.shape == image.shape[1:]:
                return _with_classes(image, classes, source.mask_classes.names), _caption(name)
            return None
    except BadImage:
        return None
    if isinstance(source, DetectionSource):
        return _with_boxes(image, source.objects(index), source.classes), _caption(name)
    label = source.classes[int(source.labels[index])] if source.classes and source.labels is not None else name
    return _fit(image), _caption(label)


def _caption(text: str) -> str:
    return short(text).encode("ascii", "replace").decode()  # Pillow's own font holds few other letters


def _fit(image: Tensor) -> Image.Image:
    """Scale an image, uint8 (3, H, W), to the side of a cell."""
    scale = _SIDE / max(image.shape[1:])
    height, width = (max(round(side * scale), 1) for side in image.shape[1:])
    return to_pillow(resize(image, height, width))


def _with_classes(image: Tensor, classes: Tensor, names: tuple[str, ...]) -> Image.Image:
    """Draw the pixels' classes, int (H, W), and the names of those that cover at least a fiftieth of the image."""
    picture = _fit(overlay(image, classes))
    draw, scale = ImageDraw.Draw(picture), picture.width / image.shape[2]
    for number, name in enumerate(names):
        rows, columns = (classes == number).nonzero(as_tuple=True)
        if len(rows) >= classes.numel() / 50:
            middle = len(rows) // 2  # a pixel of the class, at half of its height
            _write(draw, (int(columns[middle] * scale) - 3 * len(name), int(rows[middle] * scale) - 6), name)
    return picture


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str) -> None:
    """Write a name on a picture, white with a dark outline."""
    draw.text((max(place[0], 1), max(place[1], 0)), _caption(text), fill="white", stroke_width=1, stroke_fill="black")


def _with_boxes(image: Tensor, objects: Objects, classes: tuple[str, ...]) -> Image.Image:
    colours = [ImageColor.getrgb(colour_of(label)) for label in objects.labels.tolist()]
    masks: Any = objects.masks()
    if masks is not None and len(masks):
        painted = image.float()
        for mask, colour in zip(masks.bool(), colours, strict=True):
            painted[:, mask] = painted[:, mask].lerp(torch.tensor(colour[:3]).float()[:, None], 0.45)
        image = painted.round().to(torch.uint8)
    picture = _fit(image)
    draw, scale = ImageDraw.Draw(picture), picture.width / image.shape[2]
    for box, label, colour in zip(objects.boxes.tolist(), objects.labels.tolist(), colours, strict=True):
        left, top, right, bottom = (round(side * scale) for side in box)
        draw.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=colour)
        if len(classes) > 1 and len(colours) <= _MAX_NAMED:
            _write(draw, (left + 2, top + 1), classes[label - 1])
    return picture
