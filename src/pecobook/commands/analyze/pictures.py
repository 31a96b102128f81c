"""Pictures of an analysis, of each tokenizer and of all tokenizers side by side, as PNG bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pecobook.analysis import figures as draw
from pecobook.analysis.atlas import Atlas, atlas_picture, make_atlas
from pecobook.analysis.charts import code_usage_chart, training_curves
from pecobook.analysis.codebook_map import nearest_used
from pecobook.analysis.codewords import CodeUsage, GalleryPatch, GalleryRow, code_gallery
from pecobook.analysis.occurrences import ClassShare, class_shares
from pecobook.utils.json_files import read_metrics

NUM_IMAGES = 6
"""Number of images in grids of reconstructions and predictions."""
PATCHES = 12
"""Number of patches of each codeword in a gallery."""
QUERIES = 4
"""Number of patches that are looked up in every codebook."""


@dataclasses.dataclass(frozen=True)
class TokenizerMetrics:
    """The measurements of one tokenizer."""

    name: str
    values: dict[str, Any]
    """The metrics, as in `analysis.json`."""
    images: Tensor
    """The images of the picture of reconstructions, float (n, 3, S, S)."""
    restored: Tensor | None
    """The reconstructions of `images`; None for a tokenizer that predicts features."""
    usage: CodeUsage
    correct: dict[str, NDArray[np.bool_]]
    """Which held-out images each probe classified correctly, by the name of the probe; empty without labels."""
    matches: list[tuple[GalleryPatch, GalleryRow]]
    """The patches that the codebook treats as equal to some query patches, which are the same for all codebooks."""


def pictures_of(
    tokenizer: Any,
    images: Tensor,
    codes: Tensor,
    labels: Tensor | None,
    usage: CodeUsage,
    *,
    classes: Sequence[str],
    requested: Sequence[int],
    seed: int,
) -> tuple[dict[str, bytes], Atlas]:
    """Draw galleries of patches, the map of positions, and the atlas, by kind; return the atlas too.

    Args:
        tokenizer: the tokenizer.
        images: float (N, 3, S, S) in [0, 1].
        codes: codes of the images, int64 (N, h, w).
        labels: int64 (N,), or None.
        usage: usage of the codebook by the codes.
        classes: names of the labels.
        requested: codewords that always get a gallery.
        seed: seed for codewords and patches that are drawn at random.
    """
    codebook = tokenizer.codebook.detach().float().cpu()
    shares = None if labels is None else class_shares(codes, labels, tokenizer.num_codewords, classes)
    pictures = galleries(images, codes, usage, shares, requested=requested, seed=seed)
    pictures["positions"] = draw.position_map(codes, tokenizer.num_codewords)
    most_used = int(usage.counts.argmax())
    chosen = [most_used, *nearest_used(codebook, most_used, usage.counts)]
    if len(chosen) > 1:
        patches = code_gallery(images, codes, codewords=len(chosen), patches=6, seed=seed, chosen=chosen)
        pictures["neighbours"] = draw.gallery_picture(patches)
    atlas = make_atlas(images, codes, codebook, shares=shares, seed=seed)
    return pictures | {"atlas": atlas_picture(atlas)}, atlas


def galleries(
    images: Tensor,
    codes: Tensor,
    usage: CodeUsage,
    shares: Mapping[int, ClassShare] | None,
    *,
    requested: Sequence[int] = (),
    seed: int,
) -> dict[str, bytes]:
    """Draw patches of codewords drawn at random, and of those with the largest class lift, or the most used ones.

    `shares` are the classes of the codewords (see `class_shares`); None without labels. The requested codewords come
    before the random ones.
    """
    random = gallery_codewords(usage, requested, seed)[: len(set(requested)) + 4]
    if shares:
        ranked = sorted(shares, key=lambda code: (-shares[code].lift, code))[:4]
    else:
        ranked = np.argsort(-usage.counts, kind="stable")[: min(4, usage.codes_used)].tolist()
    drawn = {}
    for kind, chosen in (("gallery", random), ("gallery-ranked", ranked)):
        rows = code_gallery(images, codes, codewords=len(chosen), patches=PATCHES, seed=seed, chosen=chosen)
        drawn[kind] = draw.gallery_picture(rows, shares)
    return drawn


def evenly_spaced(count: int) -> Tensor:
    """Return indices of images that are evenly spaced in the split, because a split is often sorted by class."""
    return torch.linspace(0, count - 1, min(NUM_IMAGES, count)).long()


def gallery_codewords(usage: CodeUsage, requested: Sequence[int], seed: int) -> list[int]:
    """Choose the codewords of a gallery: the requested ones, four random ones in use, and the four most used ones."""
    used = np.flatnonzero(usage.counts)
    random = np.random.default_rng(seed).permutation(used)[:4].tolist()
    first = list(dict.fromkeys([*requested, *random]))
    by_use = np.argsort(-usage.counts, kind="stable")[: len(used)].tolist()
    return first + [code for code in by_use if code not in first][:4]


def side_by_side(measured: Sequence[TokenizerMetrics]) -> dict[str, bytes]:
    """Draw the reconstructions, codeword frequencies and matches of all tokenizers in one picture each."""
    originals = max((metrics.images for metrics in measured), key=lambda images: images.shape[-1])
    restored = {metrics.name: metrics.restored for metrics in measured if metrics.restored is not None}
    columns = [(name, resize_nearest(images, originals.shape[-1])) for name, images in restored.items()]
    pictures = {"reconstructions.png": draw.image_columns([("original", originals), *columns])} if columns else {}
    pictures["usage.png"] = code_usage_chart({metrics.name: metrics.usage.counts for metrics in measured})
    if len(measured) > 1:
        queries = [query for query, _ in measured[0].matches]
        rows = [(metrics.name, [row for _, row in metrics.matches]) for metrics in measured]
        pictures["matches.png"] = draw.matches_picture(queries, rows)
    return pictures


def curves_of(kind: str, sources: Mapping[str, str]) -> dict[str, bytes]:
    """Draw the training curves of the sources that are runs; the result is empty if no log has two steps."""
    logs = {name: Path(source) / "metrics.jsonl" for name, source in sources.items()}
    runs = {name: read_metrics(file) for name, file in logs.items() if file.is_file()}
    try:
        return {f"curves-{kind}.png": training_curves(runs)}
    except ValueError:
        return {}


def resize_nearest(images: Tensor, side: int) -> Tensor:
    """Resize square images by repeating pixels, so that a picture shows the pixels of the tokenizer unchanged."""
    return images if images.shape[-1] == side else F.interpolate(images, (side, side), mode="nearest")
