"""Views for detection and segmentation: an image and its objects, or its mask, transformed together.

A detection view is a single map from the pixels of the result to those of the image, so boxes and masks always fit the
image: resized, flipped, cropped and padded. The training view for segmentation is that of the paper's supplement (as in
mmsegmentation): scaled by 0.5 to 2 relative to the test size, cropped so that no class fills more than three quarters,
flipped; colours are augmented on the device.

n objects, H W of the image, h w of the view; boxes are left, top, right, bottom in pixels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pecobook.data.dense.coco_values import decode_masks
from pecobook.data.dense.detection import Objects
from pecobook.data.dense.segmentation_classes import IGNORE
from pecobook.data.sampler import key, uniforms
from pecobook.data.views import colour_draws
from pecobook.utils.images import fitted_size, resize

_GREY = (124, 116, 104)  # ImageNet's mean colour, which becomes about zero, around images smaller than their canvas
_LEAST_SIDE = 1.0  # minimum side of an object that stays in a view, pixels


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Resize to (height, width), flip, cut out a square of side `canvas` that starts at (top, left), pad it."""

    height: int
    width: int
    flip: bool = False
    top: int = 0
    left: int = 0
    canvas: int = 0
    """Side of the square canvas; 0 for none, which neither cuts nor pads."""

    @property
    def shown(self) -> tuple[int, int]:
        """Height and width of the visible part of the image."""
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
    """A training view: flipped with probability 0.5, at one of the scales or jittered on a canvas.

    Args:
        height: height of the image, in pixels.
        width: width of the image, in pixels.
        view_key: determines everything random.
        scales: lengths of the short side, one of which is drawn.
        max_size: maximum length of the long side.
        jitter: smallest and largest fraction of the canvas that the image is scaled to; empty for `scales`.
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
    return _on_canvas(moved, canvas) if canvas else moved.contiguous()


def _on_canvas(image: Tensor, side: int) -> Tensor:
    """Put an image, uint8 (3, h, w), into the upper left corner of a grey square: uint8 (3, side, side)."""
    canvas = torch.tensor(_GREY, dtype=torch.uint8)[:, None, None].repeat(1, side, side)
    canvas[:, : image.shape[1], : image.shape[2]] = image
    return canvas


def move_masks(masks: Tensor, geometry: Geometry) -> Tensor:
    """uint8 (n, H, W) to uint8 (n, h, w): each pixel takes the image's value at its centre."""
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
    """Boxes float32 (n, 4), labels int64 (n,) and, if there are any, masks uint8 (n, h, w) of the visible objects."""
    boxes = move_boxes(objects.boxes, objects.size, geometry)
    kept = (boxes[:, 2:] - boxes[:, :2] >= _LEAST_SIDE).all(1)
    if objects.segments is None:
        return {"boxes": boxes[kept], "labels": objects.labels[kept]}
    segments = [segment for segment, is_kept in zip(objects.segments, kept.tolist(), strict=True) if is_kept]
    # One by one, since each mask is as large as the image, which can be much larger than the view.
    groups = [[segment] for segment in segments] or [[]]
    masks = torch.cat([move_masks(decode_masks(group, *objects.size), geometry) for group in groups])
    seen = masks.amax((1, 2)) > 0  # (n,)
    boxes, labels, masks = boxes[kept][seen], objects.labels[kept][seen], masks[seen]
    if geometry.canvas and len(masks):  # what is left of a cut object may fill less than what is left of its box
        boxes = mask_boxes(masks)
    return {"boxes": boxes, "labels": labels, "masks": masks}


def detection_view(
    image: Tensor,
    objects: Objects,
    view_key: int,
    *,
    scales: tuple[int, ...],
    max_size: int,
    jitter: tuple[float, ...] = (),
    canvas: int = 0,
) -> dict[str, Any]:
    """Image, boxes, labels and masks of a random view, each in its own list, because they differ in shape."""
    geometry = random_geometry(*objects.size, view_key, scales=scales, max_size=max_size, jitter=jitter, canvas=canvas)
    found = view_objects(objects, geometry)
    return {"images": [move_image(image, geometry)], **{name: [value] for name, value in found.items()}}


def detection_test_view(
    image: Tensor,
    objects: Objects,
    view_key: int,  # noqa: ARG001
    *,
    short: int,
    long: int,
) -> dict[str, Any]:
    """The resized image, in a list, and its original height and width, int64 (2,)."""
    height, width = objects.size
    return {"images": [resize(image, *fitted_size(height, width, short, long))], "size": torch.tensor([height, width])}


# --------------------------------------------------------------------------------------------------------- segmentation

_TRIES = 10


def segmentation_view(
    image: Tensor, mask: Tensor, view_key: int, *, size: int, most: int, scales: tuple[float, float], max_share: float
) -> dict[str, Tensor]:
    """A square crop of an image and of its mask.

    Args:
        image: uint8 (3, H, W).
        mask: int16 (H, W), `IGNORE` where no class counts.
        view_key: identifies the view.
        size: side of the square, in pixels.
        most: maximum length of the test image's long side, in pixels.
        scales: smallest and largest factor relative to the test size.
        max_share: maximum share of a crop that one class may fill; ten positions are tried.

    Returns:
        image uint8 (3, size, size), grey beyond the image; mask int16 (size, size); colour float (9,).
    """
    u = uniforms(key(view_key, 4), 2 + 2 * _TRIES)
    height, width = mask.shape
    tested = fitted_size(height, width, size, most)[0] / height
    scale = tested * (scales[0] + float(u[0]) * (scales[1] - scales[0]))
    # The crop is cut out first and then scaled, which costs less and differs by less than a pixel.
    crop_height, crop_width = (max(min(round(size / scale), side), 1) for side in (height, width))
    for row_draw, column_draw in u[2:].reshape(_TRIES, 2).tolist():
        top, left = int(row_draw * (height - crop_height + 1)), int(column_draw * (width - crop_width + 1))
        region = mask[top : top + crop_height, left : left + crop_width]
        if max_share >= 1 or _is_varied(region, max_share):
            break
    crop = image[:, top : top + crop_height, left : left + crop_width]
    if u[1] < 0.5:
        crop, region = crop.flip(2), region.flip(1)
    new_height, new_width = (max(min(round(side * scale), size), 1) for side in (height, width))
    square = _on_canvas(resize(crop, new_height, new_width), size)
    padding = (0, size - new_width, 0, size - new_height)
    classes = F.pad(resize_mask(region, new_height, new_width), padding, value=IGNORE)
    return {"image": square, "mask": classes, "colour": colour_draws(view_key)}


def _is_varied(region: Tensor, max_share: float) -> bool:
    """Return whether no class fills more than `max_share` of the counted pixels."""
    counts = torch.bincount(region.flatten().to(torch.int64) - IGNORE)[1:]  # without IGNORE
    return int((counts > 0).sum()) > 1 and float(counts.max() / counts.sum()) < max_share


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Nearest pixel: any type (..., H, W) to (..., height, width)."""
    rows = ((torch.arange(height) + 0.5) * mask.shape[-2] / height).long()
    columns = ((torch.arange(width) + 0.5) * mask.shape[-1] / width).long()
    return mask[..., rows[:, None], columns]
