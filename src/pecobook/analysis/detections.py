"""Detections as files in COCO's format, as average precision by COCO's own code, and as pictures."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pecobook.analysis.canvas import escape_text, new_figure, png
from pecobook.models.dense.detector import Detections, paste_masks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pecobook.data.dense.detection import DetectionSource

_COLOURS = (
    "#e6550d",
    "#2a8fd8",
    "#1fa37c",
    "#c0699f",
    "#a3912a",
    "#7d7fd1",
    "#c94f3d",
    "#5f9ea8",
    "#8c6bb1",
    "#41ab5d",
)
_AREAS = ("all", "small", "medium", "large")
_TOLD = 30  # most boxes with names and scores on a picture
_DETECTIONS = 100  # of an image, the best that COCO counts


def coco_results(
    image_id: int, size: tuple[int, int], found: Detections, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Detections on one image in COCO's format of results.

    Args:
        image_id: of the image in the annotations.
        size: its height and width, pixels.
        found: in its pixels, scores above 0.
        category_ids: of the classes, in order of their labels.
    """
    from pycocotools import mask as coco

    results: list[dict[str, Any]] = []
    for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True):
        left, top, right, bottom = box
        sides = [round(value, 2) for value in (left, top, right - left, bottom - top)]
        one = {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": sides, "score": round(score, 5)}
        results.append(one)
    if found.masks is not None:
        for one, mask in zip(results, paste_masks(found.masks, found.boxes, *size), strict=True):
            runs = coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            one["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode()}
    return results


def average_precision(
    truth: dict[str, Any], results: list[dict[str, Any]], kind: str, *, detections: int = _DETECTIONS
) -> dict[str, float]:
    """Average precision and recall by pycocotools, in percent.

    ap is the mean over IoU 0.5 to 0.95, ap50 and ap75 are at one IoU; ap_small, ap_medium and ap_large are of objects
    below 32^2 pixels, below 96^2 and above; ar_1, ar_10 and ar are the recall with 1, 10 and all detections on an
    image, ar_small and so on that of such objects. What no object is there for is left out.

    Args:
        truth: images, annotations and categories in COCO's format.
        results: detections in COCO's format of results.
        kind: "bbox" or "segm".
        detections: most of an image that count; COCO's 100, and never fewer.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    most = max(detections, _DETECTIONS)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO()
        reference.dataset = truth
        reference.createIndex()
        # With its box, a mask would count by the area of that; pycocotools writes into what it is given.
        other = "segmentation" if kind == "bbox" else "bbox"
        given = [{name: value for name, value in one.items() if name != other} for one in results]
        candidates = reference.loadRes(given) if given else COCO()
        job = COCOeval(reference, candidates, kind)
        job.params.maxDets = [1, 10, most]
        job.params.imgIds = [image["id"] for image in truth["images"]]
        job.evaluate()
        job.accumulate()
    precision, recall = job.eval["precision"], job.eval["recall"]  # (10, 101, C, 4, 3), (10, C, 4, 3)
    found = {"ap": precision[..., 0, 2], "ap50": precision[0, ..., 0, 2], "ap75": precision[5, ..., 0, 2]}
    for number, area in enumerate(_AREAS[1:], start=1):
        found |= {f"ap_{area}": precision[..., number, 2], f"ar_{area}": recall[..., number, 2]}
    found |= {"ar_1": recall[..., 0, 0], "ar_10": recall[..., 0, 1], "ar": recall[..., 0, 2]}
    return {name: 100 * float(values[values > -1].mean()) for name, values in found.items() if (values > -1).any()}


def evaluate_detections(
    source: DetectionSource, found: Iterable[tuple[int, Detections]], *, detections: int = _DETECTIONS
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Average precision of boxes (names begin with `box_`) and masks (`mask_`), in percent, and the results themselves.

    Args:
        source: the images.
        found: numbers of images and what was found on them, each once.
        detections: most of an image that count.
    """
    indices: list[int] = []
    results: list[dict[str, Any]] = []
    for index, one in found:
        indices.append(index)
        results += coco_results(source.image_id(index), source.size(index), one, source.category_ids)
    metrics: dict[str, float] = {}
    for name, kind in (("box", "bbox"), ("mask", "segm")) if source.has_masks else (("box", "bbox"),):
        values = average_precision(source.ground_truth(indices), results, kind, detections=detections)
        metrics |= {f"{name}_{what}": value for what, value in values.items()}
    return metrics, results


# ------------------------------------------------------------------------------------------------------------ pictures


def detections_picture(columns: Mapping[str, Sequence[tuple[Tensor, Detections]]], classes: Sequence[str]) -> bytes:
    """A PNG with a titled column for each entry, of images uint8 (3, H, W) with what is on them.

    Masks may be 28 x 28 or of the image's size.
    """
    lines = max(map(len, columns.values()))
    first = next(iter(columns.values()))
    heights = [3.2 * image.shape[1] / image.shape[2] for image, _ in first]
    figure = new_figure(3.3 * len(columns), sum(heights) + 0.1 * lines + 0.3)
    grid = figure.subplots(lines, len(columns), squeeze=False, gridspec_kw={"height_ratios": heights})
    figure.subplots_adjust(left=0, right=1, bottom=0, top=0.96, wspace=0.03, hspace=0.04)
    for column, (title, pictures) in enumerate(columns.items()):
        grid[0][column].set_title(escape_text(title), fontsize=9, color="#7b7b80")
        for line, (image, found) in enumerate(pictures):
            draw_detections(grid[line][column], image, found, classes)
    return png(figure)


def draw_detections(axes: Axes, image: Tensor, found: Detections, classes: Sequence[str]) -> None:
    """Draw an image uint8 (3, H, W) and, on it, boxes, masks, names, and scores where they are below 1."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    height, width = image.shape[1:]
    pixels = image.permute(1, 2, 0).float().numpy() / 255
    for mask, label in zip(_whole_masks(found, height, width), found.labels.tolist(), strict=False):
        inside = mask.numpy().astype(bool)
        pixels[inside] = 0.55 * pixels[inside] + 0.45 * np.array(to_rgb(colour_of(label)))
    axes.set_axis_off()
    axes.imshow(pixels, interpolation="nearest")
    told = len(found.boxes) <= _TOLD  # more words would hide what they name
    for box, score, label in zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True):
        left, top, right, bottom = box
        corner = (left - 0.5, top - 0.5)
        edge = {"edgecolor": colour_of(label), "linewidth": 0.9}
        axes.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, **edge))  # type: ignore[arg-type]
        text = (classes[label - 1] if len(classes) > 1 else "") + ("" if score >= 1 else f" {score:.2f}")
        if told and text.strip():
            ground = {"facecolor": colour_of(label), "edgecolor": "none", "pad": 0.6}
            axes.text(
                *corner, escape_text(text.strip()), fontsize=4.5, color="white", va="bottom", bbox=ground, clip_on=True
            )


def colour_of(label: int) -> str:
    """Of a class, the same in every picture."""
    return _COLOURS[(label - 1) % len(_COLOURS)]


def _whole_masks(found: Detections, height: int, width: int) -> Iterable[Tensor]:
    if found.masks is None:
        return ()
    if found.masks.shape[1:] == (height, width):
        return list(found.masks)
    return paste_masks(found.masks, found.boxes, height, width)
