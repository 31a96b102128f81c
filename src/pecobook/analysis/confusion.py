"""Predictions of a classifier as a file, and the confusion matrix as a picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from torch import Tensor

from pecobook.analysis.arrays import Array, as_numpy
from pecobook.analysis.canvas import escape_text, new_figure, png
from pecobook.analysis.semantics import joint_counts
from pecobook.data.source import ImageSource
from pecobook.utils.files import write_atomically

_MAX_NAMED_CLASSES = 40


def confusion_picture(labels: Array, predictions: Array, classes: tuple[str, ...], unit: str = "images") -> bytes:
    """Draw the confusion matrix of images, or of another `unit`, as a PNG; `labels` and `predictions` are int (N,)."""
    return matrix_picture(joint_counts(labels, predictions, len(classes), len(classes)), classes, unit)


def matrix_picture(counts: Array, classes: tuple[str, ...], unit: str = "images") -> bytes:
    """Draw a confusion matrix as a PNG, with the names of the classes if there are few classes.

    Args:
        counts: (C, C), how often each class (row) was predicted as each class (column). Each row is drawn as shares.
        classes: names of the classes.
        unit: what is counted, for the title.
    """
    matrix = as_numpy(counts)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    has_names = len(classes) <= _MAX_NAMED_CLASSES
    side = 2.5 + (0.28 * len(classes) if has_names else 6.0)
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    heatmap = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    accuracy = 100 * float(np.trace(matrix)) / max(int(matrix.sum()), 1)
    axes.set_title(f"{accuracy:.1f}% of {int(matrix.sum()):,} {unit} are right", fontsize=10)
    axes.set_xlabel("predicted")
    axes.set_ylabel("labelled")
    if has_names:
        names = [escape_text(name) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(classes)), names, fontsize=7)
    figure.colorbar(heatmap, ax=axes, fraction=0.046, label="share of the class")
    return png(figure)


def write_predictions(file: Path, rows: dict[str, Tensor], classes: tuple[str, ...], source: ImageSource) -> None:
    """Write a parquet file with one row per image or clip: name, label, predicted class, and the five best classes.

    `rows` holds index and label (N,), classes and probabilities (N, 5), in any order; an image that occurs twice gets
    one row.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    index, first = np.unique(as_numpy(rows["index"]), return_index=True)
    label, best = as_numpy(rows["label"])[first], as_numpy(rows["classes"])[first]
    names = np.array(classes, dtype=object)
    table = pa.table(
        {
            source.unit.removesuffix("s"): [source.identify(int(number)) for number in index],
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
