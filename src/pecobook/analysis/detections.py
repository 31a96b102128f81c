"""Detections in the COCO format, their average precision (computed by pycocotools), and pictures of them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from torch import Tensor

from pecobook.analysis.canvas import escape_text, new_figure, png
from pecobook.data.dense.detection import DetectionSource
from pecobook.models.dense.detector import Detections, paste_masks

_COLOURS = (
    *("#e6550d", "#2a8fd8", "#1fa37c", "#c0699f", "#a3912a"),
    *("#7d7fd1", "#c94f3d", "#5f9ea8", "#8c6bb1", "#41ab5d"),
)
_MAX_LABELLED = 30  # boxes on a picture with names and scores
_MAX_DETECTIONS = 100  # per image, as in COCO


def coco_results(
    image_id: int, size: tuple[int, int], detections: Detections, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Convert the detections on one image to the COCO results format.

    Args:
        image_id: the id of the image in the annotations.
        size: height and width of the image in pixels.
        detections: detections in pixels of the image, with scores above 0.
        category_ids: category ids of the classes, ordered by label.
    """
    from pycocotools import mask as coco

    results: list[dict[str, Any]] = []
    for (left, top, right, bottom), score, label in _objects(detections):
        bbox = [round(value, 2) for value in (left, top, right - left, bottom - top)]
        category = category_ids[label - 1]
        results.append({"image_id": image_id, "category_id": category, "bbox": bbox, "score": round(score, 5)})
    if detections.masks is not None:
        for result, mask in zip(results, paste_masks(detections.masks, detections.boxes, *size), strict=True):
            runs = coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            result["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode()}
    return results


def average_precision(
    truth: dict[str, Any], results: list[dict[str, Any]], kind: str, *, max_detections: int = _MAX_DETECTIONS
) -> dict[str, float]:
    """Compute average precision and average recall in percent with pycocotools.

    ap is the mean over IoU 0.5 to 0.95; ap50 and ap75 use one IoU. ap_small, ap_medium and ap_large are for objects
    below 32^2 pixels, below 96^2 pixels, and above. ar_1, ar_10 and ar are the average recall with 1, 10 and all
    detections per image; ar_small, ar_medium and ar_large are for objects of these sizes. A metric without any objects
    is omitted.

    Args:
        truth: images, annotations and categories in the COCO format.
        results: detections in the COCO results format.
        kind: "bbox" or "segm".
        max_detections: maximum number of detections per image that count; values below 100 (as in COCO) are raised to
            100.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = truth
        reference.createIndex()
        # If a mask has a box, pycocotools takes the area from the box. Copies, because pycocotools changes its input.
        unused = "segmentation" if kind == "bbox" else "bbox"
        copies = [{name: value for name, value in result.items() if name != unused} for result in results]
        job = COCOeval(reference, reference.loadRes(copies) if copies else COCO(), kind)
        job.params.maxDets = [1, 10, max(max_detections, _MAX_DETECTIONS)]
        job.params.imgIds = [image["id"] for image in truth["images"]]
        job.evaluate()
        job.accumulate()
    precision, recall = job.eval["precision"], job.eval["recall"]  # (10, 101, C, 4, 3), (10, C, 4, 3)
    tables = {"ap": precision[..., 0, 2], "ap50": precision[0, ..., 0, 2], "ap75": precision[5, ..., 0, 2]}
    for number, area in enumerate(("small", "medium", "large"), start=1):
        tables |= {f"ap_{area}": precision[..., number, 2], f"ar_{area}": recall[..., number, 2]}
    tables |= {"ar_1": recall[..., 0, 0], "ar_10": recall[..., 0, 1], "ar": recall[..., 0, 2]}
    return {name: 100 * float(values[values > -1].mean()) for name, values in tables.items() if (values > -1).any()}


def evaluate_detections(
    source: DetectionSource, detected: Iterable[tuple[int, Detections]], *, max_detections: int = _MAX_DETECTIONS
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Compute the metrics of `average_precision` for boxes (prefix `box_`) and masks (prefix `mask_`).

    Args:
        source: the source of the images.
        detected: pairs of an image's index and the detections on the image, each image once.
        max_detections: maximum number of detections per image that count.

    Returns:
        the metrics in percent, and the detections in the COCO results format.
    """
    indices: list[int] = []
    results: list[dict[str, Any]] = []
    for index, detections in detected:
        indices.append(index)
        results += coco_results(source.image_id(index), source.size(index), detections, source.category_ids)
    metrics: dict[str, float] = {}
    for name, kind in (("box", "bbox"), ("mask", "segm")) if source.has_masks else (("box", "bbox"),):
        values = average_precision(source.ground_truth(indices), results, kind, max_detections=max_detections)
        metrics |= {f"{name}_{metric}": value for metric, value in values.items()}
    return metrics, results


# ------------------------------------------------------------------------------------------------------------ pictures


def detections_picture(columns: Mapping[str, Sequence[tuple[Tensor, Detections]]], classes: Sequence[str]) -> bytes:
    """Draw one titled column per entry, of images, uint8 (3, H, W), with their detections; return a PNG.

    Masks may be 28 x 28 or have the size of the image.
    """
    num_rows = max(map(len, columns.values()))
    first = next(iter(columns.values()))
    heights = [3.2 * image.shape[1] / image.shape[2] for image, _ in first]
    figure = new_figure(3.3 * len(columns), sum(heights) + 0.1 * num_rows + 0.3)
    grid = figure.subplots(num_rows, len(columns), squeeze=False, gridspec_kw={"height_ratios": heights})
    figure.subplots_adjust(left=0, right=1, bottom=0, top=0.96, wspace=0.03, hspace=0.04)
    for column, (title, pictures) in enumerate(columns.items()):
        grid[0][column].set_title(escape_text(title), fontsize=9, color="#7b7b80")
        for row, (image, detections) in enumerate(pictures):
            _draw_detections(grid[row][column], image, detections, classes)
    return png(figure)


def _draw_detections(axes: Axes, image: Tensor, detections: Detections, classes: Sequence[str]) -> None:
    """Draw an image, uint8 (3, H, W), with boxes, masks, class names, and the scores below 1."""
    height, width = image.shape[1:]
    pixels = image.permute(1, 2, 0).float().numpy() / 255
    for mask, label in zip(_full_size_masks(detections, height, width), detections.labels.tolist(), strict=False):
        inside = mask.numpy().astype(bool)
        pixels[inside] = 0.55 * pixels[inside] + 0.45 * np.array(to_rgb(colour_of(label)))
    axes.set_axis_off()
    axes.imshow(pixels, interpolation="nearest")
    has_labels = len(detections.boxes) <= _MAX_LABELLED  # more labels would hide the objects
    for (left, top, right, bottom), score, label in _objects(detections):
        corner = (left - 0.5, top - 0.5)
        edge = {"edgecolor": colour_of(label), "linewidth": 0.9}
        axes.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, **edge))  # type: ignore[arg-type]
        text = (classes[label - 1] if len(classes) > 1 else "") + ("" if score >= 1 else f" {score:.2f}")
        if has_labels and text.strip():
            text = escape_text(text.strip())
            background = {"facecolor": colour_of(label), "edgecolor": "none", "pad": 0.6}
            axes.text(*corner, text, fontsize=4.5, color="white", va="bottom", bbox=background, clip_on=True)


def colour_of(label: int) -> str:
    """Return the colour of a class, which is the same in every picture."""
    return _COLOURS[(label - 1) % len(_COLOURS)]


def _objects(detections: Detections) -> Iterable[tuple[list[float], float, int]]:
    """Return (box, score, label) of each detection."""
    return zip(detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)


def _full_size_masks(detections: Detections, height: int, width: int) -> Iterable[Tensor]:
    if detections.masks is None:
        return ()
    if detections.masks.shape[1:] == (height, width):
        return list(detections.masks)
    return paste_masks(detections.masks, detections.boxes, height, width)
