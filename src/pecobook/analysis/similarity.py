"""Which of two images is more like a third: two-alternative judgements (paper, Figure 1), and people's own where given.

A slightly shifted copy looks like the image; a blurred one of the same pixel error does not. How a distance is made of
tokens the paper does not say: here it is the mean Euclidean distance between the codewords at each place.

Shapes: images float (N, 3, H, W) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pecobook.analysis.arrays import Tokenizer
from pecobook.analysis.reconstruction import encode_all
from pecobook.analysis.stability import blur, shift
from pecobook.errors import DataError

Distance = Callable[[Tensor, Tensor], Tensor]
"""Two batches of images to (N,), smaller for more alike."""


def pixel_distance(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distance of pixels, (N,)."""
    found: Tensor = torch.linalg.vector_norm((x - y).flatten(1), dim=1)
    return found


def code_distance(tokenizer: Tokenizer) -> Distance:
    """Mean Euclidean distance between the codewords of two images at each place."""

    def distance(x: Tensor, y: Tensor) -> Tensor:
        book = tokenizer.codebook.detach().float().cpu()
        first, second = (book[encode_all(tokenizer, images)] for images in (x, y))  # (N, h, w, D)
        apart: Tensor = torch.linalg.vector_norm(first - second, dim=-1)  # (N, h, w)
        return apart.flatten(1).mean(1)

    return distance


@dataclass(frozen=True)
class Judgements:
    """How often a distance finds the shifted copy more alike than the blurred one."""

    right: float
    """Percent."""
    shifted: Tensor
    """Distances (N,) to the shifted copies."""
    blurred: Tensor
    """Distances (N,) to the blurred copies."""


def shifted_and_blurred(images: Tensor) -> tuple[Tensor, Tensor]:
    """Copies that people call alike (shifted by 1/56 of the side) and unlike (blurred by 1/40 of it)."""
    side = images.shape[-1]
    return shift(images, max(round(side / 56), 1)), blur(images, max(side / 40, 0.8))


def judge(images: Tensor, distance: Distance) -> Judgements:
    """Two-alternative judgements of a distance on shifted and blurred copies."""
    shifted, blurred = shifted_and_blurred(images)
    to_shifted, to_blurred = distance(images, shifted), distance(images, blurred)
    return Judgements(100 * float((to_shifted < to_blurred).float().mean()), to_shifted, to_blurred)


# ------------------------------------------------------------------------------------------------- people's judgements


@dataclass(frozen=True)
class Triplets:
    """References and two alternatives, and the share of people who find the second more alike."""

    reference: Tensor
    first: Tensor
    second: Tensor
    prefer_second: Tensor
    """(N,) in [0, 1]."""


def read_bapps(folder: Path, size: int, *, limit: int = 1000) -> Triplets:
    """A folder in the layout of BAPPS's 2AFC part: `ref/`, `p0/`, `p1/` with PNGs and `judge/` with .npy of one name.

    The folder may also hold such folders (`cnn/`, `traditional/`), at any depth.

    Raises:
        DataError: there is no such layout, or a file is missing or unreadable.
    """
    from pecobook.data.decode import BadImage, decode
    from pecobook.data.views import center_crop
    from pecobook.pixels import to_float

    found = sorted(path for judges in folder.rglob("judge") for path in judges.glob("*.npy"))[:limit]
    if not found:
        raise DataError(f"'{folder}' is not in the layout of BAPPS: ref/, p0/, p1/ with pictures and judge/ with .npy.")
    images: dict[str, list[Tensor]] = {"ref": [], "p0": [], "p1": []}
    answers = []
    for file in found:
        for part, taken in images.items():
            picture = file.parent.parent / part / f"{file.stem}.png"
            try:
                taken.append(center_crop(decode(picture.read_bytes(), name=str(picture)), size))
            except (OSError, BadImage) as error:
                raise DataError(f"'{picture}' of the judgements cannot be read: {error}") from None
        answers.append(float(np.load(file, allow_pickle=False).reshape(-1)[0]))
    stacked = {part: to_float(torch.stack(taken)) for part, taken in images.items()}
    return Triplets(stacked["ref"], stacked["p0"], stacked["p1"], torch.tensor(answers))


def agreement(triplets: Triplets, distance: Distance) -> float:
    """Percent of people with whom a distance agrees, on average over triplets (LPIPS, arXiv 1801.03924, section 4)."""
    second = distance(triplets.reference, triplets.second) < distance(triplets.reference, triplets.first)
    return 100 * float(torch.where(second, triplets.prefer_second, 1 - triplets.prefer_second).mean())
