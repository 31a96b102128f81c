"""Two-alternative judgements of image similarity (paper, Figure 1), also compared with human judgements.

A slightly shifted copy looks similar to the image; a blurred copy with the same pixel error does not. The paper does
not define the distance between tokens: here it is the mean Euclidean distance of the codewords at each position.

Shapes: images float (N, 3, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pecobook.analysis.arrays import Tokenizer
from pecobook.analysis.reconstruction import encode_all
from pecobook.analysis.stability import blur, shift
from pecobook.data.decode import BadImage, decode, read_file
from pecobook.data.views import center_crop
from pecobook.errors import DataError, loading_reason
from pecobook.utils.images import to_float

Distance = Callable[[Tensor, Tensor], Tensor]
"""Maps two batches of images to distances (N,), which are smaller for more similar images."""


def pixel_distance(x: Tensor, y: Tensor) -> Tensor:
    """Compute the Euclidean distance of the pixels, (N,)."""
    distance: Tensor = torch.linalg.vector_norm((x - y).flatten(1), dim=1)
    return distance


def code_distance(tokenizer: Tokenizer) -> Distance:
    """Return a function that computes the mean Euclidean distance of the codewords of two images at each position."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        book = tokenizer.codebook.detach().float().cpu()
        first, second = (book[encode_all(tokenizer, images)] for images in (x, y))  # (N, h, w, D)
        distances: Tensor = torch.linalg.vector_norm(first - second, dim=-1)  # (N, h, w)
        return distances.flatten(1).mean(1)

    return distance


def shifted_and_blurred(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return copies that look similar (shifted by 1/56 of the side) and copies that do not (blurred by 1/40 of it)."""
    side = images.shape[-1]
    return shift(images, max(round(side / 56), 1)), blur(images, max(side / 40, 0.8))


def shifted_preferred(images: Tensor, distance: Distance) -> float:
    """Return the percentage of images for which the shifted copy is nearer than the blurred copy.

    Equal distances count as one half.
    """
    shifted, blurred = shifted_and_blurred(images)
    return 100 * float(_prefers_first(distance(images, shifted), distance(images, blurred)).mean())


def _prefers_first(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 where `a` is smaller, 0 where `b` is smaller, and 0.5 for equal distances, as LPIPS does: (N,)."""
    return 0.5 + 0.5 * (b - a).sign()


# --------------------------------------------------------------------------------------------------- human judgements

_PARTS = ("ref", "p0", "p1")


@dataclass(frozen=True)
class Triplets:
    """Reference images, two alternatives of each, and the share of people who find the second more similar."""

    reference: Tensor
    first: Tensor
    second: Tensor
    prefer_second: Tensor
    """float (N,) in [0, 1]."""


def find_bapps(folder: Path, *, limit: int = 1000) -> dict[Path, float]:
    """Find the judgements in a folder with the layout of the 2AFC part of BAPPS.

    In this layout, `ref/`, `p0/` and `p1/` hold PNGs, and `judge/` holds .npy files with the same names. The folder may
    also contain such folders (`cnn/`, `traditional/`) at any depth. Of more than `limit` judgements, only evenly spaced
    ones are used.

    Returns:
        the share of people who prefer the second image, by the file of the judgement.

    Raises:
        DataError: the folder does not have this layout, or a file is missing, or a judgement cannot be read.
    """
    files = sorted(path for judges in folder.rglob("judge") for path in judges.glob("*.npy"))
    if not files:
        raise DataError(f"'{folder}' is not in the layout of BAPPS: ref/, p0/, p1/ with pictures and judge/ with .npy.")
    shares = {}
    for index in np.linspace(0, len(files) - 1, min(limit, len(files))).round().astype(int):
        file = files[index]
        for part in _PARTS:
            if not _picture(file, part).is_file():
                raise DataError(f"'{_picture(file, part)}' of the judgements cannot be read: it is not there.")
        try:
            shares[file] = float(np.load(file, allow_pickle=False).reshape(-1)[0])
        except (OSError, EOFError, ValueError, IndexError, TypeError) as error:
            raise DataError(f"'{file}' of the judgements cannot be read: {loading_reason(error)}") from None
    return shares


def read_bapps(judgements: Mapping[Path, float], size: int) -> Triplets:
    """Read the center crops of the images of judgements. Raises DataError if an image cannot be read."""
    images: dict[str, list[Tensor]] = {part: [] for part in _PARTS}
    for file in judgements:
        for part, crops in images.items():
            picture = _picture(file, part)
            try:
                crops.append(center_crop(decode(read_file(picture), name=str(picture)), size))
            except (OSError, BadImage) as error:
                raise DataError(f"'{picture}' of the judgements cannot be read: {error}") from None
    reference, first, second = (to_float(torch.stack(images[part])) for part in _PARTS)
    return Triplets(reference, first, second, torch.tensor(list(judgements.values())))


def _picture(judgement: Path, part: str) -> Path:
    return judgement.parent.parent / part / f"{judgement.stem}.png"


def agreement(triplets: Triplets, distance: Distance) -> float:
    """Return the mean percentage of people who agree with a distance (LPIPS, arXiv 1801.03924, section 4)."""
    to_first, to_second = (distance(triplets.reference, images) for images in (triplets.first, triplets.second))
    second = _prefers_first(to_second, to_first)
    return 100 * float((second * triplets.prefer_second + (1 - second) * (1 - triplets.prefer_second)).mean())
