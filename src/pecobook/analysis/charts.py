"""Charts of training curves, code usage, and probe accuracies with their sampling errors.

Every chart is returned as PNG bytes (see `canvas`); a name has the same colour in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pecobook.analysis.arrays import Array, as_numpy
from pecobook.analysis.canvas import INK, escape_text, new_figure, png, style_axes, styles
from pecobook.utils.json_files import evaluation_of, is_number, read_metrics

Metrics = Sequence[Mapping[str, Any]]
"""One mapping per logged step, as in `metrics.jsonl`."""

_WIDTH = 4.6  # inches


@dataclass(frozen=True)
class Score:
    """One point of a score chart: a percentage, and its standard error in percentage points."""

    name: str
    value: float
    standard_error: float


def training_curves(runs: Mapping[str, Metrics], metrics: Sequence[str] | None = None) -> bytes:
    """Draw one small panel per metric, with the curves of all runs, by the run's name.

    Without `metrics`, at most eight metrics that vary are drawn, `loss` first. A noisy curve is drawn faintly, and its
    running mean above it. More than eight panels are arranged in three columns.
    """
    metrics = metrics or varying_metrics(runs)[:8]
    if not metrics:
        raise ValueError("training_curves found no metric with numbers at two steps")
    columns = min(2 if len(metrics) <= 8 else 3, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = new_figure(_WIDTH * max(columns, 2) / 2, 1.75 * rows + 0.35)
    style_of = styles(list(runs))
    for position, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, columns, position + 1, sharex=figure.axes[0] if position else None)
        style_axes(axes, grid="y")
        axes.set_title(metric.replace("_", " "), color=INK, fontsize=10, loc="left")
        for name, records in runs.items():
            _curve(axes, *_series(records, metric), name, style_of[name])
        axes.locator_params(nbins=4)
        axes.margins(x=0.02)
        if position + columns >= len(metrics):
            axes.set_xlabel("step", color=INK, fontsize=9.5)
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.08, right=0.99, top=1 - 0.5 / height, bottom=0.3 / height, wspace=0.28, hspace=0.42)
    _legend(figure, figure.axes[0], len(runs), 1 - 0.22 / height)
    return png(figure)


def run_curves(log: Path) -> bytes:
    """Draw all that a run logged in its metrics.jsonl: the loss and its parts, evaluations, learning rate, speed.

    An evaluation shares the panel of the training metric of its name. The result is empty while no number is logged.
    """
    training: list[dict[str, Any]] = []
    held_out: list[dict[str, Any]] = []
    for record in read_metrics(log):
        training.append({name: value for name, value in record.items() if not name.startswith("evaluation/")})
        held_out.append({"step": record["step"], **evaluation_of(record)})
    runs: dict[str, Metrics] = {"training": training, "held-out images": held_out}
    names = dict.fromkeys(name for logged in runs.values() for record in logged for name in record if name != "step")
    metrics = [name for name in names if any(_series(logged, name)[0] for logged in runs.values())]
    return training_curves(runs, sorted(metrics, key=_rank)) if metrics else b""


def _rank(metric: str) -> int:
    """Return a metric's rank among the panels: the loss, the stage's metrics, then what every run logs."""
    last = ("grad_norm", "lr", "images_per_second", "data_wait", "tflops", "mfu", "gpu_memory")
    return -1 if metric == "loss" else last.index(metric) + 1 if metric in last else 0


def code_usage_chart(counts: Mapping[str, Array]) -> bytes:
    """Draw how often each codeword occurs, most frequent first, on a logarithmic axis; unused codewords are left out.

    `counts` maps a tokenizer's name to `CodeUsage.counts`, int (K,).
    """
    figure = new_figure(_WIDTH, 2.9)
    axes = figure.add_subplot()
    style_axes(axes)
    style_of = styles(list(counts))
    ends: list[tuple[float, str, str]] = []
    longest = 1
    for name, values in counts.items():
        ranked = np.sort(as_numpy(values))[::-1]
        used = ranked[ranked > 0]
        rank, style, longest = np.arange(1, len(used) + 1), style_of[name], max(longest, len(used))
        axes.plot(rank, used, linewidth=1.9, color=style["color"], linestyle=style["linestyle"])
        axes.plot(rank[-1:], used[-1:], marker=style["marker"], color=style["color"], markersize=4)
        ends.append((float(len(used)), f"{name}: {len(used)} of {len(ranked)} used", style["color"]))
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlim(0, 1.03 * longest)
    axes.set_xlabel("codewords, most used first", color=INK, fontsize=10)
    axes.set_ylabel("patches", color=INK, fontsize=10)
    # The names are above the right half, where there is no curve, in the colours and order of the curves' ends.
    for line, (_, label, colour) in enumerate(sorted(ends, reverse=True)):
        axes.text(
            1, 1 - 0.09 * line, escape_text(label), ha="right", va="top", transform=axes.transAxes, color=colour,
            fontsize=9.5, fontweight="bold",
        )  # fmt: skip
    return png(figure)


def score_chart(panels: Mapping[str, Sequence[Score]], *, chance: float | None = None) -> bytes:
    """Draw accuracies in percent as points with bars of one standard error to each side, in one panel per probe.

    All panels share one axis, so that they can be compared by eye.

    Args:
        panels: the scores of each panel, top row first, by the panel's title; include the control, and the untrained
            network if there is one.
        chance: chance level, drawn as a dashed line; None draws no line.
    """
    sizes = [max(len(scores), 1) for scores in panels.values()]
    figure = new_figure(_WIDTH, sum(0.36 * size + 0.55 for size in sizes) + 0.3)
    grid = figure.add_gridspec(len(panels), 1, height_ratios=[size + 0.4 for size in sizes], hspace=0.55)
    style_of = styles([score.name for scores in panels.values() for score in scores])
    low, high = _axis_limits([score for scores in panels.values() for score in scores], chance)
    for position, (title, scores) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[position])
        style_axes(axes, grid="x")
        axes.set_title(escape_text(title), color=INK, fontsize=10.5, loc="left")
        axes.set_xlim(low, high)
        _points(axes, scores, style_of)
        if chance is not None:
            axes.axvline(chance, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
        axes.tick_params(axis="x", labelbottom=position == len(panels) - 1)
    label = "accuracy, % · bars: ±1 standard error" + (" · dashed: chance" if chance is not None else "")
    figure.axes[-1].set_xlabel(label, color=INK, fontsize=10)
    return png(figure)


def _points(axes: Axes, scores: Sequence[Score], style_of: Mapping[str, Mapping[str, Any]]) -> None:
    axes.set_ylim(len(scores) - 0.4, -0.6)
    axes.set_yticks(range(len(scores)), [escape_text(score.name) for score in scores])
    for tick, score in zip(axes.get_yticklabels(), scores, strict=True):
        tick.set_color(style_of[score.name]["color"])
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", labelsize=10.5)
    for row, score in enumerate(scores):
        style = style_of[score.name]
        axes.errorbar(
            score.value, row, xerr=score.standard_error, color=style["color"], marker=style["marker"],
            markersize=5.5, linewidth=2, capsize=3.5, capthick=1.6,
        )  # fmt: skip
        axes.annotate(
            f"{score.value:.1f}%", (score.value + score.standard_error, row), xytext=(7, 0), color=INK,
            textcoords="offset points", va="center", fontsize=10,
        )  # fmt: skip


def _axis_limits(scores: Sequence[Score], chance: float | None) -> tuple[float, float]:
    """Return the limits of the shared axis, which include all bars, chance, and space on the right for the values."""
    ends = [score.value + sign * score.standard_error for score in scores for sign in (-1, 1)]
    ends += [] if chance is None else [chance]
    finite = [end for end in ends if math.isfinite(end)] or [0.0, 100.0]
    low, high = min(finite), max(finite)
    span = max(high - low, 1.0)
    return max(low - 0.06 * span, 0.0 if low >= 0 else low), high + 0.2 * span


def _curve(axes: Axes, x: Sequence[float], y: Sequence[float], name: str, style: Mapping[str, Any]) -> None:
    if not x:
        return
    line = {"color": style["color"], "linestyle": style["linestyle"]}
    if len(y) < 40:
        axes.plot(x, y, label=escape_text(name), linewidth=1.7, marker=style["marker"], markersize=2.6, **line)
        return
    width = max(len(y) // 25, 3)
    summed = np.cumsum(np.concatenate([[0.0], np.asarray(y, dtype=np.float64)]))
    first = np.maximum(np.arange(1, len(y) + 1) - width, 0)
    mean = (summed[1:] - summed[first]) / (np.arange(1, len(y) + 1) - first)
    every = slice(None, None, -(-len(y) // 1500))  # more points than pixels take time and show nothing
    axes.plot(x[every], y[every], linewidth=0.8, alpha=0.28, color=style["color"])
    axes.plot(x[every], mean[every], label=escape_text(name), linewidth=1.8, **line)


def _series(records: Metrics, metric: str) -> tuple[list[float], list[float]]:
    """Return the steps and the finite values of one metric, in the order of the log."""
    complete = [record for record in records if is_number(record.get("step")) and is_number(record.get(metric))]
    return [float(record["step"]) for record in complete], [float(record[metric]) for record in complete]


def varying_metrics(runs: Mapping[str, Metrics]) -> list[str]:
    """Return the metrics that have numbers at two or more steps and are not constant, `loss` first."""
    excluded = {"step", "epoch", "seconds", "time", "images", "lr", "learning_rate", "images_per_second"}
    names = dict.fromkeys(key for records in runs.values() for record in records for key in record)
    varying = []
    for name in names:
        values = [value for records in runs.values() for value in _series(records, name)[1]]
        if name not in excluded and len(values) > len(runs) and len(set(values)) > 1:
            varying.append(name)
    return sorted(varying, key=lambda name: name != "loss")


def _legend(figure: Figure, axes: Axes, number: int, bottom: float) -> None:
    if number > 1:
        figure.legend(
            *axes.get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0.05, bottom),
            ncols=min(number, 4), frameon=False, labelcolor="linecolor", fontsize=10, handlelength=2.2,
            columnspacing=1.4, borderaxespad=0,
        )  # fmt: skip
