"""The codebook as a landscape: neighbours of codewords, and all of them on a plane.

Shapes: codebook float (K, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pecobook.analysis.arrays import Array, as_numpy
from pecobook.analysis.canvas import INK, new_figure, plain, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection

_NAMED = 20
"""Most classes that have a colour and a name of their own on a map."""


def neighbours(codebook: Tensor, codewords: Tensor, count: int = 5) -> Tensor:
    """The codewords nearest to each of `codewords` int64 (M,), itself left out, nearest first: int64 (M, count)."""
    book = codebook.detach().float().cpu()
    chosen = codewords.cpu()
    distances = torch.cdist(book[chosen], book)  # (M, K)
    distances[torch.arange(len(chosen)), chosen] = float("inf")
    return distances.topk(min(count, len(book) - 1), largest=False).indices


def flatten(codebook: Tensor, *, kind: Literal["tsne", "pca"] = "tsne", seed: int = 0) -> NDArray[np.float32]:
    """Codewords on a plane, (K, 2): t-SNE keeps neighbours together, PCA keeps distances as far as two axes can."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    book = as_numpy(codebook.detach()).astype(np.float32)
    plane = (
        PCA(2, random_state=seed).fit_transform(book) if min(book.shape) >= 2 else np.pad(book, ((0, 0), (0, 1)))[:, :2]
    )
    if kind == "pca" or len(book) < 8:
        return np.asarray(plane, dtype=np.float32)
    start = plane / (plane[:, 0].std() + 1e-12) * 1e-4
    perplexity = min(30.0, (len(book) - 1) / 3)
    return np.asarray(
        TSNE(2, init=start, perplexity=perplexity, random_state=seed).fit_transform(book), dtype=np.float32
    )


def map_picture(plane: NDArray[np.float32], values: Array, *, title: str, classes: Sequence[str] = ()) -> bytes:
    """Codewords (K, 2) as points, coloured by `values` (K,): usage on a logarithmic scale, or, with the names of
    `classes`, the number of one; negative values are codewords that nothing uses, drawn as faint crosses. PNG.
    """
    figure = new_figure(4.6, 4.2)
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_title(title, color=INK, fontsize=10.5, loc="left")
    given = as_numpy(values).astype(np.float64)
    dead = given < 0
    axes.scatter(plane[dead, 0], plane[dead, 1], s=7, marker="x", color=INK, alpha=0.35, linewidths=0.6)
    colour = given[~dead] if classes else np.log10(np.maximum(given[~dead], 1))
    colours = _class_colours(len(classes)) if classes else {"cmap": "viridis"}
    shown = axes.scatter(plane[~dead, 0], plane[~dead, 1], s=9, c=colour, linewidths=0, **colours)
    if 0 < len(classes) <= _NAMED:
        _class_legend(axes, shown, sorted({int(value) for value in given[~dead]}), classes)
    if not classes and (~dead).any():
        bar = figure.colorbar(shown, ax=axes, fraction=0.04, pad=0.02)
        bar.set_label("patches, powers of ten", color=INK, fontsize=9)
        bar.ax.tick_params(colors=INK, labelcolor=INK, labelsize=8.5)
    return png(figure)


def _class_colours(num_classes: int) -> dict[str, Any]:
    """A colour of its own for each of a few classes; of many, neighbours in number share a hue."""
    return {"cmap": "tab20" if num_classes <= _NAMED else "hsv", "vmin": 0, "vmax": max(num_classes - 1, 19)}


def _class_legend(axes: Axes, shown: PathCollection, present: Sequence[int], classes: Sequence[str]) -> None:
    """Names of the classes that are on the map, below it."""
    from matplotlib.lines import Line2D

    colours = shown.to_rgba(np.asarray(present))
    handles = [
        Line2D([], [], linestyle="", marker="o", markersize=5, color=colour, label=plain(classes[number][:24]))
        for number, colour in zip(present, colours, strict=True)
    ]
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, 0), ncols=4, frameon=False, labelcolor=INK, fontsize=8.5,
        handletextpad=0.2, columnspacing=1.0, borderaxespad=0,
    )  # fmt: skip
