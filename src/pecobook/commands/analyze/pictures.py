"""Pictures of an analysis: of one tokenizer, and of all side by side. PNG bytes by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pecobook.analysis import figures as draw
from pecobook.analysis.charts import code_usage_chart, read_metrics, training_curves
from pecobook.analysis.codebook_map import map_picture, neighbours, project_to_plane
from pecobook.analysis.codewords import CodeUsage, code_gallery
from pecobook.analysis.semantics import joint_counts

if TYPE_CHECKING:
    from pecobook.commands.analyze.measure import TokenizerMetrics

SHOWN = 6
"""Images in grids of pictures."""
PATCHES = 12
"""Patches of a codeword in a gallery."""
_ON_MAP = 2048
"""Codewords on a map, the most used ones: t-SNE of 8,192 takes minutes, and so many points hide each other."""


def pictures_of(
    tokenizer: Any,
    images: Tensor,
    codes: Tensor,
    labels: Tensor | None,
    usage: CodeUsage,
    *,
    classes: Sequence[str],
    asked: Sequence[int],
    seed: int,
) -> dict[str, bytes]:
    """Galleries, map of places, and maps of the codebook, by kind.

    Args:
        tokenizer: the tokenizer.
        images: float (N, 3, S, S) in [0, 1].
        codes: of them, int64 (N, h, w).
        labels: int64 (N,), or None.
        usage: of the codes.
        classes: names of the labels.
        asked: codewords that get a gallery in any case.
        seed: of the codewords and patches that are drawn at random.
    """
    book = tokenizer.codebook.detach().float().cpu()
    found = {
        "gallery": gallery(images, codes, usage, asked=asked, seed=seed),
        "positions": draw.position_map(codes, tokenizer.num_codewords),
    }
    most = int(usage.counts.argmax())
    others = neighbours(book, torch.tensor([most]), len(book))[0].tolist()
    near = [code for code in others if usage.counts[code] > 0][:4]
    if near:
        row = [most, *near]
        alike = code_gallery(images, codes, codewords=len(row), patches=6, seed=seed, chosen=row)
        found["neighbours"] = draw.gallery_picture(alike)
    kept = np.sort(np.argsort(-usage.counts, kind="stable")[:_ON_MAP])
    plane = project_to_plane(book[torch.from_numpy(kept)], seed=seed)
    counts = np.where(usage.counts > 0, usage.counts, -1)[kept]
    part = f"\nthe {len(kept)} most used of {len(book)} codewords" if len(kept) < len(book) else ""
    found["map-usage"] = map_picture(plane, counts, title=f"coloured by use{part}")
    if labels is not None:
        dominant = _dominant_class(codes, labels, tokenizer.num_codewords)[kept]
        title = f"coloured by most frequent class{part}"
        found["map-classes"] = map_picture(plane, dominant, title=title, classes=classes)
    return found


def gallery(images: Tensor, codes: Tensor, usage: CodeUsage, *, asked: Sequence[int] = (), seed: int) -> bytes:
    """Patches of `shown_codewords`."""
    chosen = shown_codewords(usage, asked, seed)
    rows = code_gallery(images, codes, codewords=len(chosen), patches=PATCHES, seed=seed, chosen=chosen)
    return draw.gallery_picture(rows)


def spread(count: int) -> Tensor:
    """Numbers of the images to show: evenly through the split, which is often sorted by class."""
    return torch.linspace(0, count - 1, min(SHOWN, count)).long()


def shown_codewords(usage: CodeUsage, asked: Sequence[int], seed: int) -> list[int]:
    """Codewords that get a gallery: those asked for, four drawn at random from those in use, the four most used."""
    used = np.flatnonzero(usage.counts)
    random = np.random.default_rng(seed).permutation(used)[:4].tolist()
    first = list(dict.fromkeys([*asked, *random]))
    by_use = np.argsort(-usage.counts, kind="stable")[: len(used)].tolist()
    return first + [code for code in by_use if code not in first][:4]


def _dominant_class(codes: Tensor, labels: Tensor, num_codewords: int) -> np.ndarray[Any, Any]:
    """The label that most patches of each codeword have, -1 where nothing uses it: (K,)."""
    own = labels[:, None, None].expand(codes.shape)
    joint = joint_counts(codes, own, num_codewords, int(labels.max()) + 1)
    return np.where(joint.sum(1) > 0, joint.argmax(1), -1)


def side_by_side(measured: Sequence[TokenizerMetrics]) -> dict[str, bytes]:
    """Reconstructions and frequencies of all tokenizers together."""
    originals = max((metrics.images for metrics in measured), key=lambda images: images.shape[-1])
    columns = [(metrics.name, at_side(metrics.restored, originals.shape[-1])) for metrics in measured]
    return {
        "reconstructions.png": draw.image_columns([("original", originals), *columns], max_rows=SHOWN),
        "usage.png": code_usage_chart({metrics.name: metrics.usage.counts for metrics in measured}),
    }


def curves_of(kind: str, sources: Mapping[str, str]) -> dict[str, bytes]:
    """Training curves of the runs among these, in one picture; nothing where none has a log of two steps."""
    logs = {name: Path(source) / "metrics.jsonl" for name, source in sources.items()}
    runs = {name: read_metrics(file) for name, file in logs.items() if file.is_file()}
    try:
        return {f"curves-{kind}.png": training_curves(runs)}
    except ValueError:
        return {}


def at_side(images: Tensor, side: int) -> Tensor:
    """Square images at another size without inventing pixels, so that each is seen as it is."""
    return images if images.shape[-1] == side else F.interpolate(images, (side, side), mode="nearest")
