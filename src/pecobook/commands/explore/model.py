"""The values that the page shows: an image's codes, a codeword, the list of codewords, and masked predictions.

Shapes: N images, code grid (h, w), K codewords, S side of a tokenizer's images. Pictures are uint8 tensors (3, H, W).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pecobook.analysis.arrays import evaluation_mode
from pecobook.analysis.atlas import Atlas, arrange, tile_of
from pecobook.analysis.codebook_map import nearest_used
from pecobook.analysis.occurrences import MIN_IMAGES, ClassCounts, Occurrences, class_counts, main_places, occurrences
from pecobook.analysis.position import MIN_PATCHES, Position, commonest_code_accuracy, position_dependence
from pecobook.analysis.reconstruction import decode_all, encode_all, psnr
from pecobook.commands.masked_run import MaskedRun
from pecobook.data.source import ImageSource
from pecobook.data.stream import central_crops
from pecobook.engine.log import Progress
from pecobook.errors import some_of
from pecobook.utils.images import to_float
from pecobook.utils.printer import say

EXEMPLARS, NEIGHBOURS, TOP = 30, 8, 5
PAGE = 80
"""Number of codewords on a page of the list."""
_POSITION_IMAGES = 2000
SORTS = ("use", "lift", "purity", "place", "number")
Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class IndexedTokenizer:
    """A tokenizer with the codes of held-out images, whose pixels are read again when they are shown."""

    name: str
    tokenizer: Any
    rows: NDArray[np.int64]
    """The index in the source of each encoded image, (N,)."""
    codes: NDArray[np.int32]
    """(N, h, w)."""
    found: Occurrences
    classes: tuple[str, ...]
    """Names of the classes; empty without labels."""
    labels: NDArray[np.int64] | None
    by_class: ClassCounts | None
    places: tuple[NDArray[np.int64], NDArray[np.int64]]
    """Each codeword's most frequent position, in row-major order, and its number of patches there, (K,) each."""
    position: Position
    """How far the codes of at most `_POSITION_IMAGES` images depend on the position."""
    colours: NDArray[np.uint8]
    """(K, 3): similar codewords have similar colours."""
    examples: Tensor
    """A typical patch of each codeword, uint8 (K, 3, f, f); grey if there is none."""

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of patches of each codeword, (K,)."""
        return self.found.counts


def index(name: str, tokenizer: Any, source: ImageSource, limit: int) -> IndexedTokenizer:
    """Encode at most `limit` images of the source, batch by batch, and show the progress."""
    rows, codes, skipped = [], [], []
    examples = _Examples(tokenizer.num_codewords, tokenizer.stride)
    with Progress(total=min(limit, len(source)), start=0, name=f"codes of {name}", quiet=False) as progress:
        for done, batch in central_crops(source, tokenizer.image_size, limit=limit):
            if "image" in batch:
                batch_codes = encode_all(tokenizer, batch["image"])
                rows.append(batch["index"].numpy())
                codes.append(batch_codes.numpy().astype(np.int32))
                examples.add(batch["image"], batch_codes)
            skipped += batch["skipped"]
            progress.show(done, {})
    if skipped:
        say(f"{len(skipped)} images cannot be read and are left out: {some_of(skipped, 3)}")
    return indexed(name, tokenizer, source, np.concatenate(rows), np.concatenate(codes), examples.patches)


class _Examples:
    """A typical patch of each codeword: one near the mean of those before it, in 4 x 4 colours."""

    def __init__(self, num_codewords: int, f: int) -> None:
        self.patches = torch.full((num_codewords, 3, f, f), 128, dtype=torch.uint8)
        self._distance = torch.full((num_codewords,), float("inf"))
        self._sums, self._counts = torch.zeros(num_codewords, 48), torch.zeros(num_codewords)

    def add(self, images: Tensor, codes: Tensor) -> None:
        """Keep nearer patches from a batch, uint8 (B, 3, S, S) with codes (B, h, w)."""
        B, h, w = codes.shape
        small = F.adaptive_avg_pool2d(images.float(), (4 * h, 4 * w)).view(B, 3, h, 4, w, 4)
        small, flat = small.permute(0, 2, 4, 1, 3, 5).reshape(-1, 48), codes.flatten()
        self._sums.index_add_(0, flat, small)
        self._counts += torch.bincount(flat, minlength=len(self._counts))
        distance = (small - self._sums[flat] / self._counts[flat, None]).square().sum(1)
        nearest = distance.argsort(descending=True)  # among equal codewords the last one counts
        chosen = dict(zip(flat[nearest].tolist(), nearest.tolist(), strict=True))
        f = self.patches.shape[-1]
        for code, patch in chosen.items():
            if distance[patch] < self._distance[code]:
                self._distance[code] = distance[patch]
                image, row, column = np.unravel_index(patch, (B, h, w))
                self.patches[code] = images[image, :, row * f : (row + 1) * f, column * f : (column + 1) * f]


def indexed(
    name: str, tokenizer: Any, source: ImageSource, rows: NDArray[np.int64], codes: NDArray[np.int32], examples: Tensor
) -> IndexedTokenizer:
    """Count the codes int32 (N, h, w) of the images `rows` of the source."""
    found = occurrences(codes, tokenizer.num_codewords)
    labels = None if source.labels is None else source.labels[rows]
    classes = source.classes or ()
    by_class = None if labels is None else class_counts(found, labels, len(classes))
    colours = code_colours(tokenizer.codebook.detach().float().cpu())
    places = main_places(found)
    position = position_dependence(codes[:: -(-len(codes) // _POSITION_IMAGES)])
    return IndexedTokenizer(
        name, tokenizer, rows, codes, found, classes, labels, by_class, places, position, colours, examples
    )


def code_colours(codebook: Tensor) -> NDArray[np.uint8]:
    """Return colours (K, 3) from 26 to 242: the ranks along the three principal directions of a codebook (K, D)."""
    K, D = codebook.shape
    centred = codebook - codebook.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[: min(3, D)]
    projected = F.pad(centred @ directions.T, (0, 3 - len(directions)))
    ranks = projected.argsort(0).argsort(0).float() / max(K - 1, 1)
    return to_picture(0.1 + 0.85 * ranks).numpy()


def to_picture(image: Tensor) -> Tensor:
    """Convert floats in [0, 1] to uint8."""
    return (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


# ------------------------------------------------------------------------------------------------------------- an image


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """The codes of an image, int64 (h, w), and its pictures."""

    codes: Tensor
    original: Tensor
    restored: Tensor
    error: Tensor
    """The absolute error, averaged over the channels; the largest one is white."""
    psnr: float


def encode_image(tokenizer: Any, image: Tensor) -> EncodedImage:
    """Encode and decode an image, uint8 (3, S, S)."""
    x = to_float(image)[None]
    codes = encode_all(tokenizer, x)
    restored = decode_all(tokenizer, codes)
    error = (x - restored).abs().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    error = error / max(float(error.max()), 1e-6)
    return EncodedImage(codes[0], image, to_picture(restored[0]), to_picture(error[0]), float(psnr(x, restored)[0]))


def image_values(tokenizer: IndexedTokenizer, encoded: EncodedImage) -> Json:
    """Return the codes and colours of the tokens, and the quality of the reconstruction."""
    return {
        "codes": encoded.codes.tolist(),
        "colours": [[f"rgb({r},{g},{b})" for r, g, b in row] for row in tokenizer.colours[encoded.codes].tolist()],
        "distinct": len(set(encoded.codes.flatten().tolist())),
        "psnr": round(encoded.psnr, 1),
    }


# ----------------------------------------------------------------------------------------------------------- codewords


def codeword_values(tokenizer: IndexedTokenizer, codeword: int) -> Json:
    """Return a codeword's usage, examples, positions, classes and neighbours."""
    found, counts = tokenizer.found, tokenizer.counts
    patches = found.of(codeword)
    places = np.bincount(patches[:, 1] * found.grid[1] + patches[:, 2], minlength=found.grid[0] * found.grid[1])
    drawn = found.exemplars(codeword, EXEMPLARS)
    count = int(counts[codeword])
    return {
        "codeword": codeword,
        "count": count,
        "images": len(np.unique(patches[:, 0])),
        "of": found.num_images,
        "share": 100 * count / len(found.patches),
        "rank": int((counts > count).sum()) + 1 if count else None,
        "used": int((counts > 0).sum()),
        "places": places.reshape(found.grid).tolist(),
        "exemplars": [
            {
                "image": int(tokenizer.rows[image]),
                "row": row,
                "column": column,
                "class": "" if tokenizer.labels is None else tokenizer.classes[tokenizer.labels[image]],
            }
            for image, row, column in drawn.tolist()
        ],
        "neighbours": [
            {"codeword": other, "count": int(counts[other])}
            for other in nearest_used(tokenizer.tokenizer.codebook, codeword, counts, NEIGHBOURS)
        ],
        **_class_values(tokenizer, codeword),
    }


def _class_values(tokenizer: IndexedTokenizer, codeword: int) -> Json:
    """Return the classes that clearly occur more often with a codeword, the highest lift first."""
    by_class = tokenizer.by_class
    if by_class is None:
        return {"labelled": False, "classes": []}
    rows = by_class.rows(codeword)
    evident = np.flatnonzero(by_class.is_evidence[rows]) + rows.start
    order = evident[np.argsort(-by_class.lift[evident], kind="stable")]
    return {
        "labelled": True,
        "min_images": MIN_IMAGES,
        "classes_seen": rows.stop - rows.start,
        "classes": [
            {
                **dataclasses.asdict(by_class.share(row, tokenizer.classes)),
                "images": int(by_class.images[row]),
                "size": int(by_class.class_sizes[by_class.label[row]]),
            }
            for row in order.tolist()
        ],
    }


def codeword_list(tokenizer: IndexedTokenizer, sort: str, page: int) -> Json:
    """Return one page of all codewords, sorted by one of `SORTS`, the largest value first; `page` counts from 1.

    Purity and place need `MIN_PATCHES` patches, and lift needs evidence; codewords without a value follow by usage.
    """
    counts = tokenizer.counts
    is_frequent = counts >= MIN_PATCHES
    place, most = tokenizer.places
    bound = np.where(is_frequent, 100 * most / np.maximum(counts, 1), 0.0)
    label, value = np.zeros(len(counts), dtype=np.int64), np.zeros(len(counts))
    if sort == "place":
        value = bound
    elif sort == "purity" and tokenizer.by_class is not None:
        label, purity = tokenizer.by_class.purity(counts)
        value = np.where(is_frequent, purity, 0.0)
    elif sort == "lift" and tokenizer.by_class is not None:
        rows = tokenizer.by_class.best()
        codewords = tokenizer.by_class.codeword[rows]
        label[codewords], value[codewords] = tokenizer.by_class.label[rows], tokenizer.by_class.lift[rows]
    numbers = np.arange(len(counts))
    order = numbers if sort == "number" else np.lexsort((numbers, -counts, -value))
    pages = -(-len(order) // PAGE)
    page = min(max(page, 1), pages)
    shown = order[(page - 1) * PAGE : page * PAGE]
    columns = tokenizer.found.grid[1]
    return {
        "sort": sort,
        "page": page,
        "pages": pages,
        "total": len(counts),
        "used": int((counts > 0).sum()),
        "min_patches": MIN_PATCHES,
        "codewords": [
            {
                "codeword": code,
                "count": int(counts[code]),
                "value": round(float(value[code]), 1) or None,
                "class": tokenizer.classes[label[code]] if sort in ("lift", "purity") and value[code] else "",
                "place": [int(part) for part in divmod(int(place[code]), columns)],
            }
            for code in shown.tolist()
        ],
    }


def tiles(tokenizer: IndexedTokenizer, codewords: list[int]) -> Tensor:
    """Return a decoded patch of each codeword next to an example, uint8 (n, 3, f, 2 f).

    The decoded patch is the centre of 3 x 3 tokens that all have this codeword.
    """
    decoded = to_picture(decode_all(tokenizer.tokenizer, torch.tensor(codewords)[:, None, None].expand(-1, 3, 3)))
    f = decoded.shape[-1] // 3
    return torch.cat([decoded[..., f : 2 * f, f : 2 * f], tokenizer.examples[codewords]], dim=3)


def atlas(tokenizer: IndexedTokenizer) -> Atlas:
    """Arrange the typical patches of the codewords in use by the similarity of their vectors."""
    examples, by_class = tokenizer.examples, tokenizer.by_class
    return arrange(
        tokenizer.found,
        tokenizer.tokenizer.codebook,
        examples.float().mean((2, 3)).numpy(),
        examples.shape[-1],
        lambda code, side: tile_of(examples[code], side),
        by_class.shares(tokenizer.classes) if by_class is not None else {},
    )


# -------------------------------------------------------------------------------------------------- masked prediction


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction of M masked patches."""

    picture: Tensor
    """The image, with the decoded prediction in the masked patches."""
    codes: Tensor
    """The true codes of all patches, int64 (h, w)."""
    top: Tensor
    """The most probable codes, int64 (M, TOP), row after row."""
    probabilities: Tensor
    """float (M, TOP)."""


def predict(run: MaskedRun, image: Tensor, mask: Tensor) -> Prediction:
    """Predict the masked patches of an image.

    Args:
        run: the pre-trained ViT.
        image: uint8 (3, S, S).
        mask: bool (h, w), True = masked.
    """
    x, device = to_float(image)[None], run.mean.device
    with evaluation_mode(run):
        codes = run.encode(x.to(device))
        ranked = run(x.to(device), mask[None].to(device)).float().softmax(1).topk(min(TOP, len(run.codebook)), dim=1)
        guess = codes.clone()
        guess[mask[None].to(device)] = ranked.indices[:, 0]
        decoded = decode_all(run, guess.cpu())
    pasted = F.interpolate(decoded, image.shape[1:], mode="bilinear", antialias=True)
    is_hidden = F.interpolate(mask[None, None].float(), image.shape[1:], mode="nearest") > 0.5
    picture = to_picture(torch.where(is_hidden, pasted, x)[0])
    return Prediction(picture, codes.cpu()[0].clone(), ranked.indices.cpu().clone(), ranked.values.cpu().clone())


def prediction_values(prediction: Prediction, mask: Tensor) -> Json:
    """Return the true code and the most probable ones for each masked patch, and how many of them are right."""
    truth = prediction.codes[mask]
    right = (prediction.top == truth[:, None]).cumsum(1)
    return {
        "masked": len(truth),
        "right": int(right[:, 0].sum()),
        "right_of_top": int(right[:, -1].sum()),
        "tokens": [
            {"row": row, "column": column, "code": code, "top": [[*pair] for pair in zip(codes, values, strict=True)]}
            for (row, column), code, codes, values in zip(
                mask.nonzero().tolist(),
                truth.tolist(),
                prediction.top.tolist(),
                prediction.probabilities.tolist(),
                strict=True,
            )
        ],
    }


def chance_values(tokenizer: IndexedTokenizer, codes: Tensor, mask: Tensor, without: int | None) -> Json:
    """Return the percentage of the masked codes that would be right by chance.

    Args:
        tokenizer: the tokenizer with the codes of the source.
        codes: the image's codes, int64 (h, w).
        mask: bool (h, w), True = masked.
        without: index of the image in the source, whose own codes are excluded; None for an image from elsewhere.

    Returns:
        `uniform`: one of K codewords at random; `place`: always the most frequent codeword at the position, or None if
        the codes of the source have another grid.
    """
    others = tokenizer.codes if without is None else tokenizer.codes[tokenizer.rows != without]
    is_comparable = len(others) > 0 and others.shape[1:] == codes.shape
    place = commonest_code_accuracy(torch.from_numpy(others), codes[None], mask[None]) if is_comparable else None
    return {"uniform": 100 / len(tokenizer.counts), "place": place}
