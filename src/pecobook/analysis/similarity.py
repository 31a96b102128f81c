"""Which of two images is more like a third: two-alternative judgements (paper, Figure 1), and people's own where given.

A slightly shifted copy looks like the image; a blurred one of the same pixel error does not. How a distance is made of
tokens the paper does not say: here it is the mean Euclidean distance between the codewords at each place.

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
from pecobook.errors import DataError, first_line

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
    """Percent; where both are as near, a half."""
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
    return Judgements(100 * float(_nearer(to_shifted, to_blurred).mean()), to_shifted, to_blurred)


def _nearer(a: Tensor, b: Tensor) -> Tensor:
    """1 where distance `a` is the smaller, 0 where `b` is, and a half where they are equal (LPIPS's rule): (N,)."""
    return 0.5 + 0.5 * (b - a).sign()


# ------------------------------------------------------------------------------------------------- people's judgements

_PARTS = ("ref", "p0", "p1")


@dataclass(frozen=True)
class Triplets:
    """References and two alternatives, and the share of people who find the second more alike."""

    reference: Tensor
    first: Tensor
    second: Tensor
    prefer_second: Tensor
    """(N,) in [0, 1]."""


def find_bapps(folder: Path, *, limit: int = 1000) -> dict[Path, float]:
    """Judgements in a folder in the layout of BAPPS's 2AFC part, and the share of people who prefer the second.

    That is `ref/`, `p0/`, `p1/` with PNGs and `judge/` with .npy of one name. The folder may also hold such folders
    (`cnn/`, `traditional/`), at any depth; of more than `limit` judgements evenly spaced ones are taken from all.

    Raises:
        DataError: there is no such layout, or a file is missing, or no judgement can be read from it.
    """
    files = sorted(path for judges in folder.rglob("judge") for path in judges.glob("*.npy"))
    if not files:
        raise DataError(f"'{folder}' is not in the layout of BAPPS: ref/, p0/, p1/ with pictures and judge/ with .npy.")
    found = {}
    for place in np.linspace(0, len(files) - 1, min(limit, len(files))).round().astype(int):
        file = files[place]
        for part in _PARTS:
            if not _picture(file, part).is_file():
                raise DataError(f"'{_picture(file, part)}' of the judgements cannot be read: it is not there.")
        try:
            found[file] = float(np.load(file, allow_pickle=False).reshape(-1)[0])
        except (OSError, EOFError, ValueError, IndexError, TypeError) as error:
            raise DataError(f"'{file}' of the judgements cannot be read: {first_line(error)}") from None
    return found


def read_bapps(judgements: Mapping[Path, float], size: int) -> Triplets:
    """The pictures of judgements, central crops of a size. Raises DataError when one cannot be read."""
    from pecobook.data.decode import BadImage, decode
    from pecobook.data.views import center_crop
    from pecobook.utils.images import to_float

    images: dict[str, list[Tensor]] = {part: [] for part in _PARTS}
    for file in judgements:
        for part, taken in images.items():
            picture = _picture(file, part)
            try:
                taken.append(center_crop(decode(picture.read_bytes(), name=str(picture)), size))
            except (OSError, BadImage) as error:
                raise DataError(f"'{picture}' of the judgements cannot be read: {error}") from None
    stacked = {part: to_float(torch.stack(taken)) for part, taken in images.items()}
    return Triplets(stacked["ref"], stacked["p0"], stacked["p1"], torch.tensor(list(judgements.values())))


def _picture(judgement: Path, part: str) -> Path:
    return judgement.parent.parent / part / f"{judgement.stem}.png"


def agreement(triplets: Triplets, distance: Distance) -> float:
    """Percent of people with whom a distance agrees, on average over triplets (LPIPS, arXiv 1801.03924, section 4)."""
    to_first, to_second = (distance(triplets.reference, other) for other in (triplets.first, triplets.second))
    second = _nearer(to_second, to_first)
    return 100 * float((second * triplets.prefer_second + (1 - second) * (1 - triplets.prefer_second)).mean())
