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
from pecobook.analysis.charts import code_usage_chart, read_metrics, training_curves
from pecobook.analysis.codebook_map import nearest_used
from pecobook.analysis.codewords import CodeUsage, code_gallery

NUM_IMAGES = 6
"""Number of images in grids of reconstructions and predictions."""
PATCHES = 12
"""Number of patches of each codeword in a gallery."""


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
        requested: codewords that certainly get a gallery.
        seed: seed for codewords and patches that are drawn at random.
    """
    codebook = tokenizer.codebook.detach().float().cpu()
    pictures = {
        "gallery": gallery(images, codes, usage, requested=requested, seed=seed),
        "positions": draw.position_map(codes, tokenizer.num_codewords),
    }
    most_used = int(usage.counts.argmax())
    chosen = [most_used, *nearest_used(codebook, most_used, usage.counts)]
    if len(chosen) > 1:
        patches = code_gallery(images, codes, codewords=len(chosen), patches=6, seed=seed, chosen=chosen)
        pictures["neighbours"] = draw.gallery_picture(patches)
    atlas = make_atlas(images, codes, codebook, labels=labels, classes=classes, seed=seed)
    return pictures | {"atlas": atlas_picture(atlas)}, atlas


def gallery(images: Tensor, codes: Tensor, usage: CodeUsage, *, requested: Sequence[int] = (), seed: int) -> bytes:
    """Draw patches of the codewords that `gallery_codewords` chooses."""
    chosen = gallery_codewords(usage, requested, seed)
    patches = code_gallery(images, codes, codewords=len(chosen), patches=PATCHES, seed=seed, chosen=chosen)
    return draw.gallery_picture(patches)


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
    """Draw the reconstructions and the codeword frequencies of all tokenizers in one picture each."""
    originals = max((metrics.images for metrics in measured), key=lambda images: images.shape[-1])
    restored = {metrics.name: metrics.restored for metrics in measured if metrics.restored is not None}
    columns = [(name, resize_nearest(images, originals.shape[-1])) for name, images in restored.items()]
    pictures = {"reconstructions.png": draw.image_columns([("original", originals), *columns])} if columns else {}
    return {**pictures, "usage.png": code_usage_chart({metrics.name: metrics.usage.counts for metrics in measured})}


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
