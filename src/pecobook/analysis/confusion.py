"""What a classifier said of each held-out image, as a file, and which classes it takes for which, as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pecobook.analysis.arrays import Array, as_numpy
from pecobook.analysis.canvas import escape_text, new_figure, png
from pecobook.utils.files import write_atomically

if TYPE_CHECKING:
    from pecobook.data.source import ImageSource

_MOST_NAMES = 40


def confusion_matrix(labels: Array, predictions: Array, num_classes: int) -> NDArray[np.int64]:
    """How often each class (row) was taken for each (column): (C, C)."""
    pairs = as_numpy(labels).astype(np.int64) * num_classes + as_numpy(predictions).astype(np.int64)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def confusion_picture(labels: Array, predictions: Array, classes: tuple[str, ...]) -> bytes:
    """The confusion matrix of images as a PNG."""
    return matrix_picture(confusion_matrix(labels, predictions, len(classes)), classes)


def matrix_picture(counts: Array, classes: tuple[str, ...], what: str = "images") -> bytes:
    """Counts (C, C) as a PNG, each row as shares of its class; with names where there are few classes."""
    matrix = as_numpy(counts)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    named = len(classes) <= _MOST_NAMES
    side = 2.5 + (0.28 * len(classes) if named else 6.0)
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    shown = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    right = 100 * float(np.trace(matrix)) / max(int(matrix.sum()), 1)
    axes.set_title(f"{right:.1f}% of {int(matrix.sum()):,} {what} are right", fontsize=10)
    axes.set_xlabel("predicted")
    axes.set_ylabel("labelled")
    if named:
        names = [escape_text(name) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(classes)), names, fontsize=7)
    figure.colorbar(shown, ax=axes, fraction=0.046, label="share of the class")
    return png(figure)


def write_predictions(file: Path, rows: dict[str, Tensor], classes: tuple[str, ...], source: ImageSource) -> None:
    """Write a parquet file, a row an image: its name, label, best class, and the five best with their probabilities.

    `rows` holds index and label (N,), classes and probabilities (N, 5), in any order; equal images stand once.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    index, first = np.unique(as_numpy(rows["index"]), return_index=True)
    label, best = as_numpy(rows["label"])[first], as_numpy(rows["classes"])[first]
    names = np.array(classes, dtype=object)
    table = pa.table(
        {
            "image": [source.identify(int(number)) for number in index],
            "label": names[label].tolist(),
            "prediction": names[best[:, 0]].tolist(),
            "correct": best[:, 0] == label,
            "best": names[best].tolist(),
            "probabilities": as_numpy(rows["probabilities"])[first].astype(np.float32).tolist(),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_atomically(file, buffer.getvalue())
