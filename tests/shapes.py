"""Pictures of coloured rectangles with masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

COLOURS = np.array([[60, 60, 60], [220, 40, 40], [40, 200, 60]], np.uint8)  # ground, red, green


def shape(number: int, height: int = 40, width: int = 56) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return a picture uint8 (H, W, 3) and a mask uint8 (H, W) of classes 0, 1, 2; the last row of the mask is 255."""
    rng = np.random.default_rng(number)
    mask = np.zeros((height, width), np.uint8)
    for value in (1, 2):
        top, left = rng.integers(0, height - 12), rng.integers(0, width - 14)
        mask[top : top + rng.integers(8, 12), left : left + rng.integers(8, 14)] = value
    picture = COLOURS[mask].astype(int) + rng.integers(-25, 25, (height, width, 3))
    mask[-1] = 255
    return picture.clip(0, 255).astype(np.uint8), mask


def write_pairs(folder: Path, numbers: range, masks: str = "masks") -> None:
    """Write `images/N.jpg` and `masks/N.png` into a folder."""
    for name in ("images", masks):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        picture, mask = shape(number)
        Image.fromarray(picture).save(folder / "images" / f"{number}.jpg", quality=95)
        Image.fromarray(mask).save(folder / masks / f"{number}.png")


def write_shapes(root: Path, train: int = 12, val: int = 4) -> Path:
    """Write a data set: train/, val/ and classes.txt."""
    write_pairs(root / "train", range(train))
    write_pairs(root / "val", range(100, 100 + val))
    (root / "classes.txt").write_text("ground\nred\ngreen\n")
    return root
