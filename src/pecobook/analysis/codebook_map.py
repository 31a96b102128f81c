"""Neighbours of codewords, and maps of all codewords in a plane.

Shapes: codebook float (K, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from torch import Tensor

from pecobook.analysis.arrays import Array, as_numpy
from pecobook.analysis.canvas import INK, escape_text, new_figure, png

_MAX_NAMED_CLASSES = 20
"""Maximum number of classes for which a map shows separate colours and names."""


def nearest_used(codebook: Tensor, codeword: int, counts: NDArray[np.int64], number: int = 4) -> list[int]:
    """Return the `number` nearest codewords to `codeword` in use, nearest first; `counts` (K,) is the usage."""
    vectors = codebook.detach().float().cpu()
    nearest = torch.cdist(vectors[[codeword]], vectors)[0].argsort(stable=True).tolist()
    return [other for other in nearest if other != codeword and counts[other] > 0][:number]


def project_to_plane(codebook: Tensor, *, seed: int = 0) -> NDArray[np.float32]:
    """Project codewords to a plane, (K, 2), with t-SNE, which preserves neighbourhoods, or PCA for few codewords."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    vectors = as_numpy(codebook.detach()).astype(np.float32)
    if min(vectors.shape) >= 2:
        plane = PCA(2, random_state=seed).fit_transform(vectors)
    else:
        plane = np.pad(vectors, ((0, 0), (0, 1)))[:, :2]
    if len(vectors) >= 8:
        start = plane / (plane[:, 0].std() + 1e-12) * 1e-4
        perplexity = min(30.0, (len(vectors) - 1) / 3)
        plane = TSNE(2, init=start, perplexity=perplexity, random_state=seed).fit_transform(vectors)
    return np.asarray(plane, dtype=np.float32)


def map_picture(plane: NDArray[np.float32], values: Array, *, title: str, classes: Sequence[str] = ()) -> bytes:
    """Draw codewords as coloured points, and unused codewords as faint crosses; return a PNG.

    Args:
        plane: positions of the codewords, (K, 2).
        values: (K,), how often each codeword is used, on a logarithmic colour scale, or, with `classes`, the index of
            its class; negative for an unused codeword.
        title: the title of the picture.
        classes: names of the classes; empty if `values` are usage counts.
    """
    figure = new_figure(4.6, 4.2)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_title(title, color=INK, fontsize=10.5, loc="left")
    numbers = as_numpy(values).astype(np.float64)
    is_unused = numbers < 0
    axes.scatter(plane[is_unused, 0], plane[is_unused, 1], s=7, marker="x", color=INK, alpha=0.35, linewidths=0.6)
    colour = numbers[~is_unused] if classes else np.log10(np.maximum(numbers[~is_unused], 1))
    colours = _class_colours(len(classes)) if classes else {"cmap": "viridis"}
    points = axes.scatter(plane[~is_unused, 0], plane[~is_unused, 1], s=9, c=colour, linewidths=0, **colours)
    if 0 < len(classes) <= _MAX_NAMED_CLASSES:
        _class_legend(axes, points, sorted({int(value) for value in numbers[~is_unused]}), classes)
    if not classes and (~is_unused).any():
        bar = figure.colorbar(points, ax=axes, fraction=0.04, pad=0.02)
        bar.set_label("patches, powers of ten", color=INK, fontsize=9)
        bar.ax.tick_params(colors=INK, labelcolor=INK, labelsize=8.5)
    return png(figure)


def _class_colours(num_classes: int) -> dict[str, Any]:
    """Return the colour map: few classes get separate colours; of many classes, consecutive ones have similar hues."""
    return {
        "cmap": "tab20" if num_classes <= _MAX_NAMED_CLASSES else "hsv",
        "vmin": 0,
        "vmax": max(num_classes - 1, 19),
    }


def _class_legend(axes: Axes, points: PathCollection, present: Sequence[int], classes: Sequence[str]) -> None:
    """Write the names of the classes that occur on the map below the map."""
    colours = points.to_rgba(np.asarray(present))
    handles = [
        Line2D([], [], linestyle="", marker="o", markersize=5, color=colour, label=escape_text(classes[number][:24]))
        for number, colour in zip(present, colours, strict=True)
    ]
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, 0), ncols=4, frameon=False, labelcolor=INK, fontsize=8.5,
        handletextpad=0.2, columnspacing=1.0, borderaxespad=0,
    )  # fmt: skip
