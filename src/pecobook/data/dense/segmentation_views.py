"""Views of an image and its mask for segmentation: scaled, cropped and flipped together, by a 64-bit key.

The training view is that of the paper's supplement (as mmsegmentation's): scaled by 0.5 to 2 against the size of the
test, cropped so that no class fills more than three quarters, flipped; colours are changed on the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pecobook.data.dense.segmentation_classes import IGNORE
from pecobook.data.sampler import key, uniforms
from pecobook.data.views import colour_draws
from pecobook.utils.images import fitted_size, resize

_TRIES = 10
_GREY = (124, 116, 104)  # ImageNet's mean colour, which becomes about zero


def training_view(
    image: Tensor,
    mask: Tensor,
    view_key: int,
    *,
    size: int,
    most: int,
    scales: tuple[float, float],
    max_share: float,
) -> dict[str, Tensor]:
    """A square of an image and of its mask.

    Args:
        image: uint8 (3, H, W).
        mask: int16 (H, W), `IGNORE` where no class counts.
        view_key: names the view.
        size: side of the square, pixels.
        most: long side of the test's image, pixels.
        scales: least and largest factor beside the test's.
        max_share: most of a crop that one class may fill; ten places are tried.

    Returns:
        image uint8 (3, size, size), grey where the image ends; mask int16 (size, size); colour float (9,).
    """
    u = uniforms(key(view_key, 4), 2 + 2 * _TRIES)
    height, width = mask.shape
    tested = fitted_size(height, width, size, most)[0] / height
    scale = tested * (scales[0] + float(u[0]) * (scales[1] - scales[0]))
    # The crop is cut out first and scaled then, which costs less and differs by less than a pixel.
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
    square = torch.tensor(_GREY, dtype=torch.uint8)[:, None, None].repeat(1, size, size)
    square[:, :new_height, :new_width] = resize(crop, new_height, new_width)
    classes = F.pad(
        resize_mask(region, new_height, new_width), (0, size - new_width, 0, size - new_height), value=IGNORE
    )
    return {"image": square, "mask": classes, "colour": colour_draws(view_key)}


def _is_varied(region: Tensor, max_share: float) -> bool:
    """Whether no class fills more than `max_share` of what counts."""
    counts = torch.bincount(region.flatten().to(torch.int64) - IGNORE)[1:]  # without IGNORE
    return int((counts > 0).sum()) > 1 and float(counts.max() / counts.sum()) < max_share


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Nearest pixel: any type (..., H, W) to (..., height, width)."""
    rows = ((torch.arange(height) + 0.5) * mask.shape[-2] / height).long()
    columns = ((torch.arange(width) + 0.5) * mask.shape[-1] / width).long()
    return mask[..., rows[:, None], columns]
