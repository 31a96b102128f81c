"""Views for detection: an image and its objects, resized, flipped, cropped and padded together.

A view is one map from the pixels of the result to those of the image, so boxes and masks always fit the image.

n objects, H W of the image, h w of the view; boxes are left, top, right, bottom in pixels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pecobook.data.dense.coco_masks import decode_masks
from pecobook.data.dense.detection import Objects
from pecobook.data.sampler import uniforms
from pecobook.utils.images import fitted_size, resize

_GREY = (124, 116, 104)  # ImageNet's mean colour, around images smaller than their canvas
_LEAST_SIDE = 1.0  # of an object that is left in a view, pixels


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Resize to (height, width), flip, cut out a square of side `canvas` that begins at (top, left), pad it."""

    height: int
    width: int
    flip: bool = False
    top: int = 0
    left: int = 0
    canvas: int = 0
    """Side of the square canvas; 0 for none, which neither cuts nor pads."""

    @property
    def shown(self) -> tuple[int, int]:
        """Height and width of what is left of the image."""
        if not self.canvas:
            return self.height, self.width
        return min(self.height - self.top, self.canvas), min(self.width - self.left, self.canvas)


def random_geometry(
    height: int,
    width: int,
    view_key: int,
    *,
    scales: tuple[int, ...],
    max_size: int,
    jitter: tuple[float, ...],
    canvas: int,
) -> Geometry:
    """A view of training: flipped in half of all cases, at one of the scales or jittered on a canvas.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        view_key: everything random follows from it.
        scales: lengths of the short side, one of which is drawn.
        max_size: longest side.
        jitter: smallest and largest share of the canvas that the image is scaled to; empty for `scales`.
        canvas: side of the canvas.
    """
    u = uniforms(view_key, 5)
    flip = bool(u[0] < 0.5)
    if not jitter:
        short = scales[int(u[1] * len(scales))]
        return Geometry(*fitted_size(height, width, short, max_size), flip=flip)
    side = canvas * (jitter[0] + u[1] * (jitter[1] - jitter[0]))
    h, w = fitted_size(height, width, side, side)
    top, left = (int(draw * (max(full - canvas, 0) + 1)) for draw, full in ((u[2], h), (u[3], w)))
    return Geometry(h, w, flip=flip, top=top, left=left, canvas=canvas)


def move_image(image: Tensor, geometry: Geometry) -> Tensor:
    """uint8 (3, H, W) to uint8 (3, h, w)."""
    moved = resize(image, geometry.height, geometry.width)
    moved = moved.flip(2) if geometry.flip else moved
    (height, width), canvas = geometry.shown, geometry.canvas
    moved = moved[:, geometry.top : geometry.top + height, geometry.left : geometry.left + width]
    if not canvas:
        return moved.contiguous()
    whole = torch.tensor(_GREY, dtype=torch.uint8)[:, None, None].repeat(1, canvas, canvas)
    whole[:, :height, :width] = moved
    return whole


def move_masks(masks: Tensor, geometry: Geometry) -> Tensor:
    """uint8 (n, H, W) to uint8 (n, h, w): each pixel is that of the image at its centre."""
    (height, width), canvas = geometry.shown, geometry.canvas
    rows, columns = torch.arange(height) + geometry.top, torch.arange(width) + geometry.left
    columns = geometry.width - 1 - columns if geometry.flip else columns
    rows = ((rows + 0.5) * (masks.shape[1] / geometry.height)).long()
    columns = ((columns + 0.5) * (masks.shape[2] / geometry.width)).long()
    moved = masks[:, rows][:, :, columns]
    return F.pad(moved, (0, canvas - width, 0, canvas - height)) if canvas else moved


def move_boxes(boxes: Tensor, size: tuple[int, int], geometry: Geometry) -> Tensor:
    """Float (n, 4) on an image of `size` to the view, cut at its edge."""
    scale = torch.tensor([geometry.width / size[1], geometry.height / size[0]]).repeat(2)
    x0, y0, x1, y1 = (boxes * scale).unbind(1)
    if geometry.flip:
        x0, x1 = geometry.width - x1, geometry.width - x0
    height, width = geometry.shown
    moved = torch.stack([x0 - geometry.left, y0 - geometry.top, x1 - geometry.left, y1 - geometry.top], 1)
    return moved.clamp(min=0).minimum(torch.tensor([width, height, width, height]))


def mask_boxes(masks: Tensor) -> Tensor:
    """The smallest boxes around masks (n, h, w), none of them empty: float32 (n, 4)."""
    rows, columns = masks.amax(2), masks.amax(1)  # (n, h), (n, w)
    first = [side.argmax(1) for side in (columns, rows)]
    last = [side.shape[1] - side.flip(1).argmax(1) for side in (columns, rows)]
    return torch.stack([*first, *last], 1).float()


def view_objects(objects: Objects, geometry: Geometry) -> dict[str, Tensor]:
    """Boxes float32 (n, 4), labels int64 (n,) and, if there are any, masks uint8 (n, h, w), of what is left to see."""
    boxes = move_boxes(objects.boxes, objects.size, geometry)
    kept = (boxes[:, 2:] - boxes[:, :2] >= _LEAST_SIDE).all(1)
    if objects.segments is None:
        return {"boxes": boxes[kept], "labels": objects.labels[kept]}
    segments = [segment for segment, is_kept in zip(objects.segments, kept.tolist(), strict=True) if is_kept]
    # One after the other, since each mask is as large as the image, which can be much larger than the view.
    groups = [[segment] for segment in segments] or [[]]
    masks = torch.cat([move_masks(decode_masks(group, *objects.size), geometry) for group in groups])
    seen = masks.amax((1, 2)) > 0  # (n,)
    boxes, labels, masks = boxes[kept][seen], objects.labels[kept][seen], masks[seen]
    if geometry.canvas and len(masks):  # what is left of a cut object may fill less than what is left of its box
        boxes = mask_boxes(masks)
    return {"boxes": boxes, "labels": labels, "masks": masks}


def training_view(
    image: Tensor,
    objects: Objects,
    view_key: int,
    *,
    scales: tuple[int, ...],
    max_size: int,
    jitter: tuple[float, ...] = (),
    canvas: int = 0,
) -> dict[str, Any]:
    """Image, boxes, labels and masks of a random view, each in a list of its own: they differ in shape."""
    geometry = random_geometry(*objects.size, view_key, scales=scales, max_size=max_size, jitter=jitter, canvas=canvas)
    found = view_objects(objects, geometry)
    return {"images": [move_image(image, geometry)], **{name: [value] for name, value in found.items()}}


def evaluation_view(
    image: Tensor,
    objects: Objects,
    view_key: int,  # noqa: ARG001
    *,
    short: int,
    long: int,
) -> dict[str, Any]:
    """The image resized, in a list, and its own height and width, int64 (2,)."""
    height, width = objects.size
    return {"images": [resize(image, *fitted_size(height, width, short, long))], "size": torch.tensor([height, width])}
