"""Metrics and pictures of semantic segmentation."""

from __future__ import annotations

import colorsys

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pecobook.data.dense.segmentation_classes import IGNORE

Picture = npt.NDArray[np.uint8]


def count_pixels(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Count the pixels of each class (row) that were predicted as each class (column): int64 (C, C).

    Args:
        predicted: int64 (H, W).
        truth: int (H, W); pixels with `IGNORE` are not counted.
        num_classes: C.
    """
    counted = truth != IGNORE
    pairs = truth[counted].long() * num_classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def intersection_over_union(counts: Tensor) -> Tensor:
    """Compute the IoU of each class, float64 (C,) in [0, 1], from counts (C, C); NaN for an absent class."""
    hits = counts.diagonal().double()
    return hits / (counts.sum(0) + counts.sum(1) - hits)


def scores(counts: Tensor) -> dict[str, float]:
    """Compute mean IoU and mean accuracy over the classes that occur, and the pixel accuracy, in percent."""
    hits, truth = counts.diagonal().double(), counts.sum(1)
    return {
        "miou": 100 * float(intersection_over_union(counts).nanmean()),
        "mean_accuracy": 100 * float((hits / truth).nanmean()),
        "pixel_accuracy": 100 * float(hits.sum() / truth.sum()),
    }


def palette(count: int) -> Picture:
    """Return different colours, uint8 (count, 3): hues spaced by the golden ratio, with three brightnesses."""
    colours = [
        colorsys.hsv_to_rgb((number * 0.61803398875) % 1.0, 0.85 - 0.3 * (number % 2), (1.0, 0.75, 0.55)[number % 3])
        for number in range(count)
    ]
    return np.round(255 * np.array(colours)).astype(np.uint8).reshape(count, 3)


def overlay(image: Tensor, classes: Tensor, strength: float = 0.55) -> Tensor:
    """Draw classes as transparent colours over an image.

    Args:
        image: uint8 (3, H, W).
        classes: int (H, W); pixels with negative values stay unchanged.
        strength: opacity of the colours, in [0, 1].

    Returns:
        uint8 (3, H, W).
    """
    colours = torch.from_numpy(palette(int(classes.max().clamp_min(0)) + 1)).float()
    painted = colours[classes.long().clamp_min(0)].permute(2, 0, 1)  # (3, H, W)
    mixed = image.float().lerp(painted, strength)
    return torch.where(classes[None] < 0, image.float(), mixed).round().to(torch.uint8)
