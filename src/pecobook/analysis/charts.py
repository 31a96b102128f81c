"""Charts of numbers: training curves, code usage, probe accuracies with their sampling error.

Every function returns PNG bytes on a transparent ground (see `canvas`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pecobook.analysis.arrays import Array, as_numpy
from pecobook.analysis.canvas import INK, new_figure, plain, png, styles, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metrics = Sequence[Mapping[str, Any]]
"""One mapping a logged step, as `metrics.jsonl` holds them."""

_WIDTH = 4.6  # inches


@dataclass(frozen=True)
class Score:
    """One point of a score chart: percent, and its standard error in percent points."""

    name: str
    value: float
    standard_error: float


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl`; a last line cut off by a crash is left out."""
    out = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            out.append(record)
    return out


def training_curves(runs: Mapping[str, Metrics], *, metrics: Sequence[str] | None = None, x: str = "step") -> bytes:
    """Small panels, one a metric, several runs in each; a noisy curve is drawn faintly under its running
    mean.

    `metrics` names the panels; without it, all numbers that vary are shown, `loss` first, eight at most.
    """
    chosen = list(metrics) if metrics is not None else _varying(runs, x)
    if not chosen:
        raise ValueError("training_curves found no metric that has numbers at two steps")
    columns = min(2, len(chosen))
    lines = -(-len(chosen) // columns)
    figure = new_figure(_WIDTH, 1.75 * lines + 0.35)
    style_of = styles(list(runs))
    for place, metric in enumerate(chosen):
        axes = figure.add_subplot(lines, columns, place + 1)
        tidy(axes, grid="y")
        axes.set_title(metric.replace("_", " "), color=INK, fontsize=10, loc="left")
        for name, records in runs.items():
            _curve(axes, *_series(records, x, metric), name, style_of[name])
        axes.locator_params(nbins=4)
        axes.margins(x=0.02)
        if place // columns == lines - 1:
            axes.set_xlabel(x, color=INK, fontsize=9.5)
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.08, right=0.99, top=1 - 0.5 / height, bottom=0.3 / height, wspace=0.28, hspace=0.42)
    _legend(figure, figure.axes[0], len(runs), 1 - 0.22 / height)
    return png(figure)


def code_usage_chart(counts: Mapping[str, Array]) -> bytes:
    """How often each codeword occurs, most frequent first, on a logarithmic axis; unused codewords end the
    line.

    `counts` maps a tokenizer's name to int (K,), `CodeUsage.counts`.
    """
    figure = new_figure(_WIDTH, 2.7)
    axes = figure.add_subplot()
    tidy(axes)
    style_of = styles(list(counts))
    for name, values in counts.items():
        ranked = np.sort(as_numpy(values))[::-1]
        used = ranked[ranked > 0]
        label = f"{name}: {len(used)} of {len(ranked)} used"
        rank = np.arange(1, len(used) + 1)
        style = style_of[name]
        axes.plot(rank, used, label=plain(label), linewidth=1.9, color=style["color"], linestyle=style["linestyle"])
        axes.plot(rank[-1:], used[-1:], marker=style["marker"], color=style["color"], markersize=4)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlim(left=0)
    axes.set_xlabel("codewords, most used first", color=INK, fontsize=10)
    axes.set_ylabel("patches", color=INK, fontsize=10)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9.5, loc="best")
    return png(figure)


def score_chart(panels: Mapping[str, Sequence[Score]], *, chance: float | None = None, unit: str = "%") -> bytes:
    """Points with bars of one standard error to each side, one panel a probe, chance as a dashed line.

    `panels` maps a panel's title to its scores, top row first: put the control, and the untrained network
    where there is one, among them. All panels share one axis, so that they can be compared by eye.
    """
    sizes = [max(len(scores), 1) for scores in panels.values()]
    figure = new_figure(_WIDTH, sum(0.36 * size + 0.55 for size in sizes) + 0.3)
    grid = figure.add_gridspec(len(panels), 1, height_ratios=[size + 0.4 for size in sizes], hspace=0.55)
    style_of = styles([score.name for scores in panels.values() for score in scores])
    low, high = _span([score for scores in panels.values() for score in scores], chance)
    for place, (title, scores) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[place])
        tidy(axes, grid="x")
        axes.set_title(plain(title), color=INK, fontsize=10.5, loc="left")
        axes.set_xlim(low, high)
        _points(axes, scores, style_of, unit)
        if chance is not None:
            axes.axvline(chance, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
        axes.tick_params(axis="x", labelbottom=place == len(panels) - 1)
    label = f"accuracy, {unit} · bars: ±1 standard error" + (" · dashed: chance" if chance is not None else "")
    figure.axes[-1].set_xlabel(label, color=INK, fontsize=10)
    return png(figure)


def _points(axes: Axes, scores: Sequence[Score], style_of: Mapping[str, Mapping[str, Any]], unit: str) -> None:
    axes.set_ylim(len(scores) - 0.4, -0.6)
    axes.set_yticks(range(len(scores)), [plain(score.name) for score in scores])
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", labelsize=10.5)
    for row, score in enumerate(scores):
        style = style_of[score.name]
        axes.errorbar(
            score.value, row, xerr=score.standard_error, color=style["color"], marker=style["marker"],
            markersize=5.5, linewidth=2, capsize=3.5, capthick=1.6,
        )  # fmt: skip
        axes.annotate(
            f"{score.value:.1f}{unit}", (score.value + score.standard_error, row), xytext=(7, 0), color=INK,
            textcoords="offset points", va="center", fontsize=10,
        )  # fmt: skip


def _span(scores: Sequence[Score], chance: float | None) -> tuple[float, float]:
    """Limits of the shared axis: all bars, chance, and room on the right for the printed values."""
    ends = [score.value + sign * score.standard_error for score in scores for sign in (-1, 1)]
    ends += [] if chance is None else [chance]
    finite = [end for end in ends if math.isfinite(end)] or [0.0, 100.0]
    low, high = min(finite), max(finite)
    room = max(high - low, 1.0)
    return max(low - 0.06 * room, 0.0 if low >= 0 else low), high + 0.2 * room


def _curve(axes: Axes, x: Sequence[float], y: Sequence[float], name: str, style: Mapping[str, Any]) -> None:
    if not x:
        return
    line = {"color": style["color"], "linestyle": style["linestyle"]}
    if len(y) < 40:
        axes.plot(x, y, label=plain(name), linewidth=1.7, marker=style["marker"], markersize=2.6, **line)
        return
    width = max(len(y) // 25, 3)
    summed = np.cumsum(np.concatenate([[0.0], np.asarray(y, dtype=np.float64)]))
    first = np.maximum(np.arange(1, len(y) + 1) - width, 0)
    mean = (summed[1:] - summed[first]) / (np.arange(1, len(y) + 1) - first)
    axes.plot(x, y, linewidth=0.8, alpha=0.28, color=style["color"])
    axes.plot(x, mean, label=plain(name), linewidth=1.8, **line)


def _series(records: Metrics, x: str, metric: str) -> tuple[list[float], list[float]]:
    """Steps and finite values of one metric, in the order of the log."""
    both = [record for record in records if _is_number(record.get(x)) and _is_number(record.get(metric))]
    return [float(record[x]) for record in both], [float(record[metric]) for record in both]


def _varying(runs: Mapping[str, Metrics], x: str) -> list[str]:
    """Metrics worth a panel: numbers at two or more steps that are not all equal."""
    aside = {x, "step", "epoch", "seconds", "time", "images", "lr", "learning_rate", "images_per_second"}
    names = dict.fromkeys(key for records in runs.values() for record in records for key in record)
    found = []
    for name in names:
        values = [value for records in runs.values() for value in _series(records, x, name)[1]]
        if name not in aside and len(values) > len(runs) and len(set(values)) > 1:
            found.append(name)
    return sorted(found, key=lambda name: name != "loss")[:8]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _legend(figure: Figure, axes: Axes, number: int, bottom: float) -> None:
    if number > 1:
        figure.legend(
            *axes.get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0.05, bottom),
            ncols=min(number, 4), frameon=False, labelcolor=INK, fontsize=10, handlelength=2.2,
            columnspacing=1.4, borderaxespad=0,
        )  # fmt: skip
