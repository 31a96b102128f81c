"""The contents of the page: images, their codes, other patches with these codes, and masked predictions.

Shapes: N images, code grid (h, w), K codewords, S side of a tokenizer's images. Pictures are uint8 arrays (H, W, 3).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from pecobook.analysis.codebook_map import nearest_used
from pecobook.analysis.codewords import GalleryPatch, GalleryRow, code_gallery, code_usage
from pecobook.analysis.figures import position_shares
from pecobook.analysis.reconstruction import decode_all, encode_all, hide, predict_masked, psnr
from pecobook.commands.extract import extract
from pecobook.commands.masked_run import MaskedRun
from pecobook.data.decode import BadImage
from pecobook.data.sampler import fixed_permutation
from pecobook.data.source import ImageSource, Splits
from pecobook.data.views import center_crop
from pecobook.utils.images import to_float

Picture = NDArray[np.uint8]
SIDE = 448
"""Minimum size of pictures in pixels: small images are enlarged without smoothing, so that a click selects a token."""


@dataclasses.dataclass(frozen=True)
class IndexedTokenizer:
    """A tokenizer, with the held-out images of the source and their codes."""

    name: str
    tokenizer: Any
    images: Tensor
    """uint8 (N, 3, S, S)."""
    codes: Tensor
    """int64 (N, h, w)."""
    labels: Tensor | None
    counts: NDArray[np.int64]
    """Number of patches with each codeword, (K,)."""
    colours: Tensor
    """float (K, 3) in [0, 1]: similar codewords have similar colours."""


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """The codes of an image, with the pictures of the page."""

    original: Picture
    tokens: Picture
    restored: Picture
    error: Picture
    codes: Tensor
    """int64 (h, w)."""
    psnr: float


@dataclasses.dataclass(frozen=True)
class CodewordInfo:
    """Patches, positions and classes of a codeword, and its nearest codewords."""

    row: GalleryRow
    patches: list[Picture]
    classes: list[tuple[str, int, float]]
    """(class, number of patches, percentage), the most frequent class first; empty without labels."""
    nearest: list[tuple[int, Picture]]
    """The nearest codewords in use, each with one patch."""


def index(name: str, tokenizer: Any, splits: Splits, limit: int) -> IndexedTokenizer:
    """Encode at most `limit` held-out images, and show the progress."""

    def features(x: Tensor) -> dict[str, Tensor]:
        return {"images": (255 * x).round().to(torch.uint8), "codes": encode_all(tokenizer, x)}

    extracted, labels = extract(splits.evaluation, tokenizer.image_size, limit, features, f"codes of {name}")
    images, codes = extracted["images"], extracted["codes"]
    counts = code_usage(codes, tokenizer.num_codewords).counts
    colours = code_colours(tokenizer.codebook.detach().float().cpu())
    return IndexedTokenizer(name, tokenizer, images, codes, labels, counts, colours)


def code_colours(codebook: Tensor) -> Tensor:
    """Return colours (K, 3) in [0.1, 0.95]: the ranks along the three principal directions of a codebook (K, D)."""
    K, D = codebook.shape
    centred = codebook - codebook.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[: min(3, D)]
    projected = F.pad(centred @ directions.T, (0, 3 - len(directions)))
    ranks = projected.argsort(0).argsort(0).float() / max(K - 1, 1)
    return 0.1 + 0.85 * ranks


def encode_image(indexed: IndexedTokenizer, image: Tensor) -> EncodedImage:
    """Encode and decode an image, uint8 (3, H, W)."""
    crop = center_crop(image, indexed.tokenizer.image_size)
    x = to_float(crop)[None]
    codes = encode_all(indexed.tokenizer, x)
    restored = decode_all(indexed.tokenizer, codes)
    error = (x - restored).abs().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return EncodedImage(
        original=to_picture(x[0]),
        tokens=to_picture(indexed.colours[codes[0]].permute(2, 0, 1)),
        restored=to_picture(restored[0]),
        error=to_picture(error[0] / max(float(error.max()), 1e-6)),
        codes=codes[0],
        psnr=float(psnr(x, restored)[0]),
    )


def code_at(encoded: EncodedImage, x: int, y: int) -> int:
    """Return the code at a pixel of the picture."""
    h, w = encoded.codes.shape
    height, width = encoded.tokens.shape[:2]
    return int(encoded.codes[min(y * h // height, h - 1), min(x * w // width, w - 1)])


def codeword_info(
    indexed: IndexedTokenizer, code: int, classes: tuple[str, ...], *, max_patches: int = 18
) -> CodewordInfo:
    """Collect patches, positions, classes and nearest codewords of a codeword."""
    row = _gallery_row(indexed, code, max_patches)
    frequent: list[tuple[str, int, float]] = []
    if indexed.labels is not None and row.count:
        per_image = (indexed.codes == code).flatten(1).sum(1)
        by_class = torch.bincount(indexed.labels, weights=per_image.double(), minlength=len(classes))
        order = by_class.argsort(descending=True, stable=True)[:8].tolist()
        counted = [(classes[label], int(by_class[label])) for label in order if by_class[label] > 0]
        frequent = [(name, number, 100 * number / row.count) for name, number in counted]
    nearest = nearest_used(indexed.tokenizer.codebook, code, indexed.counts)
    return CodewordInfo(
        row=row,
        patches=[_outlined(patch) for patch in row.patches],
        classes=frequent,
        nearest=[(other, _outlined(_gallery_row(indexed, other, 1).patches[0])) for other in nearest],
    )


def _gallery_row(indexed: IndexedTokenizer, code: int, max_patches: int) -> GalleryRow:
    (row,) = code_gallery(indexed.images, indexed.codes, codewords=1, patches=max_patches, chosen=[code])
    return row


def _outlined(patch: GalleryPatch) -> Picture:
    """Draw a patch, outlined in its surroundings."""
    window = to_picture(patch.window)
    scale = len(window) / patch.window.shape[-2]
    top, left, height, width = (round(scale * value) for value in patch.box)
    box = torch.tensor([[left, top, left + width - 1, top + height - 1]])
    image = torch.from_numpy(window).permute(2, 0, 1)
    for thickness, colour in ((3, "white"), (1, "black")):
        image = draw_bounding_boxes(image, box, colors=colour, width=thickness)
    return to_array(image)


def painted_patches(strokes: NDArray[np.uint8], grid: tuple[int, int]) -> Tensor:
    """Return the patches, bool (h, w), of which strokes with opacity (H, W) cover a fifth or more."""
    cover = F.adaptive_avg_pool2d((torch.from_numpy(strokes.copy()).float() > 0).float()[None, None], grid)
    return cover[0, 0] >= 0.2


@torch.inference_mode()
def predict(run: MaskedRun, image: Tensor, mask: Tensor) -> tuple[Picture, Picture, float]:
    """Predict the masked patches of an image.

    Args:
        run: the pre-trained ViT.
        image: uint8 (3, H, W).
        mask: bool (h, w), True = masked.

    Returns:
        the masked image, the predicted image, and the percentage of masked codes predicted correctly.
    """
    x = to_float(center_crop(image, run.image_size))[None]
    codes, accuracy = predict_masked(run, run, x, mask[None])
    return to_picture(hide(x, mask[None])[0]), to_picture(decode_all(run, codes)[0]), accuracy


def position_picture(positions: NDArray[np.int64]) -> Picture:
    """Draw the number of patches at each position, (h, w): white for the most frequent position, black for none."""
    return to_picture(torch.from_numpy(position_shares(positions)).expand(3, -1, -1))


def to_picture(image: Tensor) -> Picture:
    """Convert a float image (3, H, W) in [0, 1] to a picture, enlarged by an integer factor to about SIDE pixels."""
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    factor = max(SIDE // max(pixels.shape[-2:]), 1)
    return to_array(pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2))


def to_array(image: Tensor) -> Picture:
    """Convert an image uint8 (3, H, W) to an array (H, W, 3)."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def thumbnails(source: ImageSource, count: int = 24) -> dict[int, Picture]:
    """Return small pictures of the first `count` readable images of a fixed permutation, by the index of the image."""
    pictures: dict[int, Picture] = {}
    for position in range(len(source)):
        image = fixed_permutation(position, len(source))
        try:
            pictures[image] = to_array(center_crop(source.read(image), 96))
        except BadImage:
            continue
        if len(pictures) == count:
            break
    return pictures
