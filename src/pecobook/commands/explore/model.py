"""All that the page asks, without the page: images, their codes, and who else has them.

N images, h w code grid, K codewords, S side of a tokenizer's images. Pictures are uint8 arrays (H, W, 3).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pecobook.analysis.codebook_map import neighbours
from pecobook.analysis.codewords import code_gallery, code_usage
from pecobook.analysis.masked_prediction import decode_prediction, hide, predict_masked
from pecobook.analysis.reconstruction import decode_all, encode_all, psnr
from pecobook.commands.extract import extract
from pecobook.commands.masked_run import MaskedRun
from pecobook.data.decode import BadImage
from pecobook.data.sampler import fixed_permutation
from pecobook.data.source import ImageSource, Splits
from pecobook.data.views import center_crop
from pecobook.utils.images import to_float

Picture = NDArray[np.uint8]
SIDE = 448
"""Pixels at which pictures are shown: small ones are enlarged without smoothing, so that clicks find a token."""


@dataclasses.dataclass(frozen=True)
class Indexed:
    """A tokenizer, and the images of the source as it sees them."""

    name: str
    tokenizer: Any
    images: Tensor
    """uint8 (N, 3, S, S)."""
    codes: Tensor
    """int64 (N, h, w)."""
    labels: Tensor | None
    counts: NDArray[np.int64]
    """Patches with each codeword, (K,)."""
    colours: Tensor
    """float (K, 3) in [0, 1]: codewords that are alike have colours that are alike."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a tokenizer makes of an image."""

    original: Picture
    tokens: Picture
    restored: Picture
    error: Picture
    codes: Tensor
    """int64 (h, w)."""
    psnr: float


@dataclasses.dataclass(frozen=True)
class Code:
    """A codeword: where else it is, and what is like it."""

    number: int
    count: int
    images: int
    patches: list[Picture]
    classes: list[tuple[str, int, float]]
    """(class, patches, percent), the most frequent first; empty without labels."""
    near: list[tuple[int, Picture]]
    """Nearest codewords in use, each with a patch."""


def index(name: str, tokenizer: Any, splits: Splits, limit: int) -> Indexed:
    """Encode at most `limit` held-out images, with progress."""

    def features(x: Tensor) -> dict[str, Tensor]:
        return {"images": (255 * x).round().to(torch.uint8), "codes": encode_all(tokenizer, x)}

    found, labels = extract(splits.evaluation, tokenizer.image_size, limit, features, f"codes of {name}")
    images, codes = found["images"], found["codes"]
    counts = code_usage(codes, tokenizer.num_codewords).counts
    colours = code_colours(tokenizer.codebook.detach().float().cpu())
    return Indexed(name, tokenizer, images, codes, labels, counts, colours)


def code_colours(codebook: Tensor) -> Tensor:
    """Colours (K, 3) in [0.1, 0.95] by rank along the three principal directions of a codebook (K, D)."""
    K, D = codebook.shape
    centred = codebook - codebook.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[: min(3, D)]
    plane = F.pad(centred @ directions.T, (0, 3 - len(directions)))
    ranks = plane.argsort(0).argsort(0).float() / max(K - 1, 1)
    return 0.1 + 0.85 * ranks


def see(one: Indexed, image: Tensor) -> Seen:
    """Look at an image, uint8 (3, H, W), through a tokenizer."""
    crop = center_crop(image, one.tokenizer.image_size)
    x = to_float(crop)[None]
    codes = encode_all(one.tokenizer, x)
    restored = decode_all(one.tokenizer, codes)
    error = (x - restored).abs().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return Seen(
        original=picture(x[0]),
        tokens=picture(one.colours[codes[0]].permute(2, 0, 1)),
        restored=picture(restored[0]),
        error=picture(error[0] / max(float(error.max()), 1e-6)),
        codes=codes[0],
        psnr=float(psnr(x, restored)[0]),
    )


def code_at(seen: Seen, x: int, y: int) -> int:
    """The code under a pixel of a picture as it is shown."""
    h, w = seen.codes.shape
    height, width = seen.tokens.shape[:2]
    return int(seen.codes[min(y * h // height, h - 1), min(x * w // width, w - 1)])


def about(one: Indexed, code: int, classes: tuple[str, ...], *, patches: int = 18) -> Code:
    """What is known of a codeword."""
    row = _patches(one, code, patches)
    told: list[tuple[str, int, float]] = []
    where = (one.codes == code).flatten(1).sum(1)  # (N,)
    total = int(where.sum())
    if one.labels is not None and total:
        by_class = torch.bincount(one.labels, weights=where.double(), minlength=len(classes))
        order = by_class.argsort(descending=True, stable=True)[:8].tolist()
        told = [(classes[c], int(by_class[c]), 100 * float(by_class[c]) / total) for c in order if by_class[c] > 0]
    book = one.tokenizer.codebook.detach().float().cpu()
    near = neighbours(book, torch.tensor([code]), len(book))[0].tolist()
    used = [other for other in near if one.counts[other] > 0][:4]
    return Code(code, total, int((where > 0).sum()), row, told, [(other, _patches(one, other, 1)[0]) for other in used])


def _patches(one: Indexed, code: int, count: int) -> list[Picture]:
    (row,) = code_gallery(one.images, one.codes, codewords=1, patches=count, chosen=[code]).rows
    found = []
    for patch in row.patches:
        window = picture(patch.window)
        scale = len(window) / patch.window.shape[-2]
        top, left, height, width = (round(scale * value) for value in patch.box)
        for thickness, colour in ((3, 255), (1, 0)):
            window[top : top + height, left : left + thickness] = colour
            window[top : top + height, left + width - thickness : left + width] = colour
            window[top : top + thickness, left : left + width] = colour
            window[top + height - thickness : top + height, left : left + width] = colour
        found.append(window)
    return found


def painted(strokes: NDArray[np.uint8], grid: tuple[int, int]) -> Tensor:
    """Patches that strokes, an opacity (H, W), cover by a fifth or more: bool (h, w)."""
    cover = F.adaptive_avg_pool2d((torch.from_numpy(strokes.copy()).float() > 0).float()[None, None], grid)
    return cover[0, 0] >= 0.2


@torch.inference_mode()
def predict(run: MaskedRun, image: Tensor, mask: Tensor) -> tuple[Picture, Picture, float]:
    """The masked image, what a ViT believes of it, and percent right: image uint8 (3, H, W), mask bool (h, w)."""
    x = to_float(center_crop(image, run.image_size))[None]
    prediction = predict_masked(run, run, x, mask[None])
    return picture(hide(x, mask[None])[0]), picture(decode_prediction(run, prediction)[0]), prediction.accuracy


def picture(image: Tensor) -> Picture:
    """Float (3, H, W) in [0, 1] as it is shown: at least SIDE pixels, enlarged by a whole number."""
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    factor = max(SIDE // max(pixels.shape[-2:]), 1)
    pixels = pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def thumbnails(source: ImageSource, count: int = 24) -> dict[int, Picture]:
    """Small pictures of images of a source, by number: the first of a fixed permutation, without unreadable ones."""
    found: dict[int, Picture] = {}
    for place in range(len(source)):
        number = fixed_permutation(place, len(source))
        try:
            crop = center_crop(source.read(number), 96)
        except BadImage:
            continue
        found[number] = np.ascontiguousarray(crop.permute(1, 2, 0).numpy())
        if len(found) == count:
            break
    return found
