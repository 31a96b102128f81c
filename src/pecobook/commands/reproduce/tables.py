"""The tables as Markdown, CSV and plots: the measured figures over seeds next to the paper's numbers."""

from __future__ import annotations

import csv
import dataclasses
import io
import statistics
from collections.abc import Sequence

from pecobook.analysis.canvas import INK, new_figure, png, style_axes
from pecobook.analysis.comparison import lookup
from pecobook.analysis.evidence import Difference, difference, family, mean_and_deviation
from pecobook.analysis.report import Table, as_markdown
from pecobook.commands.duel_arms import DUEL
from pecobook.commands.jobs import read_analysis
from pecobook.commands.paper_tables import MORE, Arm, PaperTable, Row
from pecobook.commands.reproduce.duel import probe_figures, reading
from pecobook.commands.reproduce.few_labels import FOLDERS
from pecobook.commands.reproduce.plan import Plan
from pecobook.commands.reproduce.transfers import TRANSFERS, transfer_figures
from pecobook.utils.json_files import is_number

Values = dict[str, dict[int, float]]
"""Measured value of each seed, by figure."""


@dataclasses.dataclass(frozen=True)
class MeasuredTable:
    """A table of the paper with the measured values."""

    name: str
    table: PaperTable
    rows: tuple[tuple[Row, Values, str], ...]
    """Row, values, and what is missing to train the row (an empty string if nothing is)."""
    remarks: tuple[str, ...] = ()
    """Lines on the figures that could not be measured."""
    primary: str = ""
    """The heading of the primary figure; if empty, the table's first."""

    @property
    def figures(self) -> tuple[tuple[str, str], ...]:
        """(figure, heading) of the paper's figures and of the additional figures that were measured."""
        return (*self.table.figures, *(pair for pair in MORE if self.has(pair[0])))

    def has(self, figure: str) -> bool:
        """Whether a figure was measured for any row."""
        return any(figure in values for _, values, _ in self.rows)


def measured_tables(plan: Plan) -> list[MeasuredTable]:
    """Collect the figures of the finished jobs for all tables of a plan."""
    measured = []
    for name, table in plan.tables.items():
        rows = []
        for row in table.all_rows:
            missing = plan.missing_for_arm(row.arm)
            values: Values = {}
            for seed in () if missing else plan.config.seeds:
                for figure, value in _figures(plan, plan.run_of(name, row.arm), seed).items():
                    values.setdefault(figure, {})[seed] = value
            rows.append((row, values, missing))
        lines = plan.unmeasured(table.figures)
        given = [row.label for row in table.rows if plan.config.network and plan.canonical(row.arm) != row.arm]
        lines += [f"The row '{label}' has the network {plan.config.network}." for label in given]
        if plan.duel is not None and name == DUEL:
            linear = {row.arm: values.get("linear", {}) for row, values, _ in rows}
            lines += [*plan.duel.remarks(row.arm for row, _, missing in rows if not missing), *reading(linear)]
        primary = next((heading for figure, heading in table.figures if not plan.missing_for_figure(figure)), "")
        measured.append(MeasuredTable(name, table, tuple(rows), tuple(lines), primary))
    return measured


def _figures(plan: Plan, arm: str, seed: int) -> dict[str, float]:
    figures: dict[str, float | None] = {}
    if analysis := plan.finished_analysis(Arm.parse(arm).target, seed):
        metrics = read_analysis(analysis)["tokenizers"][0]
        names = ("codeword_probe", "crossed_probe", "codes_used", "psnr")
        figures |= {figure: metrics.get(figure) for figure in names}
        for figure, key in (("position", "share"), ("null_position", "null_share")):
            share = lookup(metrics, "position", key)  # None in an analysis of an earlier version
            figures[figure] = None if share is None else 100 * share
        classifier = metrics.get("classifier", {})
        figures |= {"classified": classifier.get("reconstructions"), "originals": classifier.get("originals")}
    for kind, of_kind in {**TRANSFERS, **{kind: {kind: "top1"} for kind in FOLDERS}}.items():
        job = plan.jobs.get(f"{kind}-{arm}-{seed}")
        if job is not None and job.finished:
            figures |= transfer_figures(job, of_kind)
    figures |= probe_figures(plan.jobs, f"{arm}-{seed}")
    return {figure: float(value) for figure, value in figures.items() if is_number(value)}


def header_and_rows(measured: MeasuredTable) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the header and the rows of a table as texts."""
    table = measured.table
    header = [""]
    for figure, heading in measured.figures:
        header += [heading, "paper"] if table.has_paper_numbers(figure) else [heading]
    rows = []
    for row, values, missing in measured.rows:
        cells = [row.label + (" (control)" if row.control else "") + (f" (needs {missing})" if missing else "")]
        for figure, _ in measured.figures:
            cells.append(mean_and_deviation([*values.get(figure, {}).values()]))
            if table.has_paper_numbers(figure):
                number = table.paper_number(row, figure)
                cells.append("–" if number is None else f"{number:.1f}")
        rows.append(tuple(cells))
    return tuple(header), rows


def gains_over_controls(measured: MeasuredTable) -> list[str]:
    """Return lines on the gain of each perceptual loss over the pixel loss and over the controls, with intervals.

    The first figure that the command measures is the primary one, also before its runs are finished. Its differences
    are read together, with one correction, and those of all other figures together, with another. Differences whose
    runs are not finished count.
    """
    primary = measured.primary or measured.table.figures[0][1]
    by_arm = {row.arm: (row, values) for row, values, missing in measured.rows if not missing}
    gains: dict[str, list[Difference]] = {"Primary": [], "Secondary": []}
    for arm, control in measured.table.pairs:
        if arm in by_arm and control in by_arm:
            (row, values), (control_row, control_values) = by_arm[arm], by_arm[control]
            for figure, heading in measured.table.figures:
                if not measured.has(figure):
                    continue
                name = f"{heading}: {row.label} minus {control_row.label}"
                gain = difference(name, values.get(figure, {}), control_values.get(figure, {}))
                gains["Primary" if heading == primary else "Secondary"].append(gain)
    return [
        f"{kind}: {member.sentence()}"
        for kind, members in gains.items()
        for member in family([gain for gain in members if gain.values], len(members))
    ]


def remarks(measured: MeasuredTable) -> list[str]:
    """Return the lines below a table: the classifier's accuracy on originals, and why figures are missing."""
    originals = {
        row.label: mean_and_deviation([*values["originals"].values()])
        for row, values, _ in measured.rows
        if "originals" in values
    }
    if "classified" not in dict(measured.table.figures) or not originals:
        return list(measured.remarks)
    if len(set(originals.values())) == 1:
        accuracies = next(iter(originals.values())) + "%"
    else:
        accuracies = ", ".join(f"{accuracy}% ({label})" for label, accuracy in originals.items())
    return [f"Our classifier, on originals: {accuracies}.", *measured.remarks]


def markdown(tables: Sequence[MeasuredTable], introduction: str) -> str:
    """Return all tables as Markdown."""
    parts = ["# The paper's tables, measured again", introduction]
    for measured in tables:
        header, rows = header_and_rows(measured)
        gains = "\n".join(f"- {line}" for line in gains_over_controls(measured))
        table = measured.table
        parts += [f"## {table.title}", as_markdown(Table(header, tuple(rows))), table.note, *remarks(measured), gains]
    return "\n\n".join(part for part in parts if part) + "\n"


def comma_separated(tables: Sequence[MeasuredTable]) -> str:
    """Return all figures as CSV, one line per row and figure."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "row", "arm", "control", "figure", "paper", "mean", "deviation", "values", "seeds"])
    for measured in tables:
        for row, all_values, _ in measured.rows:
            for figure, _ in measured.figures:
                seeds = all_values.get(figure, {})
                values = list(seeds.values())
                number = measured.table.paper_number(row, figure)
                mean = round(statistics.mean(values), 3) if values else None
                deviation = round(statistics.stdev(values), 3) if len(values) > 1 else None
                by_seed = " ".join(f"{value:.3f}" for value in values)
                cells = [measured.name, row.label, row.arm, row.control, figure, number, mean, deviation, by_seed]
                writer.writerow([*cells, " ".join(map(str, seeds))])
    return out.getvalue()


def plot(measured: MeasuredTable) -> bytes:
    """Plot a table's rows as points with their deviation, as PNG.

    Each measured figure has a panel; next to it is a panel with the paper's numbers on their own scale.
    """
    table, num_rows = measured.table, len(measured.rows)
    panels: list[tuple[str, str, str]] = []
    for figure, heading in table.figures:
        if measured.has(figure):
            panels += [(figure, heading, "ours")]
            panels += [(figure, "the paper's", "paper")] if table.has_paper_numbers(figure) else []
    canvas = new_figure(2.1 + 2.6 * max(len(panels), 1), 0.34 * num_rows + 1.0)
    for number, (figure, heading, source) in enumerate(panels):
        axes = canvas.add_subplot(1, len(panels), number + 1)
        style_axes(axes, grid="x")
        axes.set_ylim(num_rows - 0.4, -0.6)
        axes.set_yticks(range(num_rows), [row.label if number == 0 else "" for row, *_ in measured.rows])
        axes.set_title(heading, color=INK, fontsize=9.5, loc="left")
        for height, (row, all_values, _) in enumerate(measured.rows):
            values = list(all_values.get(figure, {}).values())
            if source == "paper":
                paper_number = table.paper_number(row, figure)
                values = [] if paper_number is None else [paper_number]
            if values:
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                colour = "#d9822b" if row.control else "#2a8fd8" if source == "ours" else INK
                axes.errorbar(statistics.mean(values), height, xerr=deviation, color=colour, marker="o", capsize=3)
    return png(canvas)
