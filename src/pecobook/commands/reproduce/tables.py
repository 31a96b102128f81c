"""The tables: what was measured over seeds, beside what the paper has."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pecobook.analysis.canvas import INK, new_figure, png, style_axes
from pecobook.analysis.charts import read_metrics
from pecobook.commands.reproduce.paper import MORE, PaperTable, Row

if TYPE_CHECKING:
    from pecobook.commands.reproduce.plan import Plan

Values = dict[str, list[float]]
"""Figure to its values, one a seed."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A table with what was found."""

    name: str
    table: PaperTable
    rows: tuple[tuple[Row, Values, str], ...]
    """Row, values, and what it lacks."""
    lacks: tuple[str, ...] = ()
    """Lines on the figures that could not be measured."""

    @property
    def figures(self) -> tuple[tuple[str, str], ...]:
        """Those of the paper, and more that were measured."""
        return (*self.table.figures, *(pair for pair in MORE if self.has(pair[0])))

    def has(self, figure: str) -> bool:
        """Whether a figure was measured of any row."""
        return any(figure in values for _, values, _ in self.rows)


def measured(plan: Plan, tables: Mapping[str, PaperTable]) -> list[Measured]:
    """Gather the figures of finished jobs."""
    found = []
    for name, table in tables.items():
        rows = []
        for row in table.all_rows:
            lacks = plan.missing(row.arm)
            values: Values = {}
            for seed in () if lacks else plan.config.seeds:
                for figure, value in _figures(plan, plan.canonical(row.arm), seed).items():
                    values.setdefault(figure, []).append(value)
            rows.append((row, values, lacks))
        found.append(Measured(name, table, tuple(rows), tuple(plan.unmeasured(table.figures))))
    return found


def _figures(plan: Plan, arm: str, seed: int) -> dict[str, float]:
    jobs = plan.jobs
    found: dict[str, float | None] = {}
    job = jobs.get(f"judged-{arm}-{seed}") or jobs.get(f"analysis-{arm}-{seed}")
    if job is not None and job.finished:
        (told,) = json.loads((job.out / "analysis.json").read_text())["tokenizers"]
        found |= {figure: told[figure] for figure in ("codeword_probe", "codes_used", "psnr")}
        judged = told.get("classifier", {})
        found |= {"classified": judged.get("reconstructions"), "originals": judged.get("originals")}
    job = jobs.get(f"classifier-{arm}-{seed}")
    if job is not None and job.finished:
        told = [
            line["evaluation/top1"] for line in read_metrics(job.out / "metrics.jsonl") if "evaluation/top1" in line
        ]
        found["finetuned"] = told[-1]
    return {figure: float(value) for figure, value in found.items() if value is not None}


def cell(values: Sequence[float]) -> str:
    """`mean ± standard deviation over seeds`, or a dash."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def lines_of(one: Measured) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of text."""
    paper = {figure: number for number, (figure, _) in enumerate(one.table.figures)}
    header = [""]
    for figure, heading in one.figures:
        header += [heading, "paper"] if _has_paper(one.table, figure) else [heading]
    rows = []
    for row, values, lacks in one.rows:
        line = [row.label + (" (control)" if row.control else "") + (f" (needs {lacks})" if lacks else "")]
        for figure, _ in one.figures:
            line.append(cell(values.get(figure, [])))
            if _has_paper(one.table, figure):
                given = row.paper[paper[figure]] if paper[figure] < len(row.paper) else None
                line.append("–" if given is None else f"{given:.1f}")
        rows.append(tuple(line))
    return tuple(header), rows


def _has_paper(table: PaperTable, figure: str) -> bool:
    place = [name for name, _ in table.figures].index(figure) if figure in dict(table.figures) else -1
    return place >= 0 and any(len(row.paper) > place for row in table.rows)


def gains_over_controls(one: Measured) -> list[str]:
    """What the perceptual loss of each network brings over its controls, seed by seed."""
    by_arm = {row.arm: (row, values) for row, values, _ in one.rows}
    told = []
    for arm in one.table.controls:
        if arm not in by_arm:
            continue
        others = ["pixel", f"{arm}-random", f"{arm}-shuffled"]
        for other in (name for name in others if name in by_arm):
            for figure, heading in one.table.figures:
                a, b = by_arm[arm][1].get(figure, []), by_arm[other][1].get(figure, [])
                if a and len(a) == len(b):
                    apart = [x - y for x, y in zip(a, b, strict=True)]
                    each = ", ".join(f"{value:+.1f}" for value in apart)
                    names = f"{by_arm[arm][0].label} minus {by_arm[other][0].label}"
                    told.append(f"{heading}: {names}: {cell(apart)} (seeds: {each})")
    return told


def remarks(one: Measured) -> list[str]:
    """What stands below a table: how well the classifier does on originals, and why figures are missing."""
    told = {row.label: cell(values["originals"]) for row, values, _ in one.rows if "originals" in values}
    lines = []
    if "classified" in dict(one.table.figures) and told:
        alike = len(set(told.values())) == 1
        each = next(iter(told.values())) + "%" if alike else ", ".join(f"{own}% ({row})" for row, own in told.items())
        lines.append(f"Our classifier, on originals: {each}.")
    return [*lines, *one.lacks]


def markdown(found: Sequence[Measured], about: str) -> str:
    """All tables."""
    parts = ["# The paper's tables, measured again", about]
    for one in found:
        header, rows = lines_of(one)
        lines = [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]
        told = "\n".join(f"- {line}" for line in gains_over_controls(one))
        parts += [f"## {one.table.title}", "\n".join(lines), one.table.note, *remarks(one), told]
    return "\n\n".join(part for part in parts if part) + "\n"


def comma_separated(found: Sequence[Measured]) -> str:
    """All figures, a line each."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "row", "arm", "control", "figure", "paper", "mean", "deviation", "values"])
    for one in found:
        paper = {figure: number for number, (figure, _) in enumerate(one.table.figures)}
        for row, values, _ in one.rows:
            for figure, _ in one.figures:
                own, place = values.get(figure, []), paper.get(figure, len(row.paper))
                given = row.paper[place] if place < len(row.paper) else None
                mean = round(statistics.mean(own), 3) if own else None
                deviation = round(statistics.stdev(own), 3) if len(own) > 1 else None
                each = " ".join(f"{value:.3f}" for value in own)
                writer.writerow([one.name, row.label, row.arm, row.control, figure, given, mean, deviation, each])
    return out.getvalue()


def plot(one: Measured) -> bytes:
    """Rows of a table as points with their spread, a panel a figure; the paper's, on its own scale, beside each."""
    shown = [(figure, heading) for figure, heading in one.table.figures if one.has(figure)]
    panels = [(figure, heading, source) for figure, heading in shown for source in ("ours", "paper")]
    panels = [panel for panel in panels if panel[2] == "ours" or _has_paper(one.table, panel[0])]
    figure_ = new_figure(2.1 + 2.6 * max(len(panels), 1), 0.34 * len(one.rows) + 1.0)
    place = {name: number for number, (name, _) in enumerate(one.table.figures)}
    for number, (name, heading, source) in enumerate(panels):
        axes = figure_.add_subplot(1, len(panels), number + 1)
        style_axes(axes, grid="x")
        axes.set_ylim(len(one.rows) - 0.4, -0.6)
        labels = [row.label for row, *_ in one.rows] if number == 0 else [""] * len(one.rows)
        axes.set_yticks(range(len(one.rows)), labels)
        axes.set_title(heading if source == "ours" else "the paper's", color=INK, fontsize=9.5, loc="left")
        for height, (row, values, _) in enumerate(one.rows):
            own = values.get(name, [])
            if source == "paper":
                own = [given for given in row.paper[place[name] : place[name] + 1] if given is not None]
            if own:
                spread = statistics.stdev(own) if len(own) > 1 else 0.0
                colour = "#d9822b" if row.control else "#2a8fd8" if source == "ours" else INK
                axes.errorbar(statistics.mean(own), height, xerr=spread, color=colour, marker="o", capsize=3)
    return png(figure_)
