"""`pecobook reproduce`: train the runs of the paper's tables on your images, at a chosen budget, over seeds.

duel.py       a study of our own, beside the paper's tables
budgets.py    the size and the length of every kind of run
plan.py       the runs of all rows, each run once
rehearsal.py  a few steps of each kind of run before the runs start
tables.py     the tables as Markdown, CSV and plots

The rows and the paper's numbers stand in `pecobook.commands.paper_tables`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from pecobook.analysis.report import Picture, Report, Section, Table, write_pictures, write_report
from pecobook.analysis.wording import duration
from pecobook.commands.jobs import resumed_folder, run_all
from pecobook.commands.paper_tables import chosen_tables
from pecobook.commands.reproduce import rehearsal, tables
from pecobook.commands.reproduce.plan import Plan
from pecobook.engine.preamble import show_source
from pecobook.engine.value_range import open_readable
from pecobook.errors import ConfigError, PecobookError, Preflight
from pecobook.settings.codebook import CodebookConfig
from pecobook.settings.reproduce import ReproduceConfig
from pecobook.settings.values import flag_words, replace, to_dict
from pecobook.stages.codebook import CodebookStage
from pecobook.utils.files import write_atomically, write_json
from pecobook.utils.output_folder import OutputFolder
from pecobook.utils.printer import show

__all__ = ["ReproduceConfig", "reproduce"]


def reproduce(config: ReproduceConfig | None = None, **settings: Any) -> Path:
    """Train the missing runs; write `tables.md`, `tables.csv`, pictures and `report.html`; return the Markdown file.

    Raises:
        PreflightError: all problems that were found before anything was written.
        PecobookError: a run failed.
    """
    config = replace(config or ReproduceConfig(), settings)
    plan = _preflight(config)
    show(rehearsal.describe(plan))
    out = Path(config.out)
    if config.dry_run:
        show(rehearsal.remaining_time(plan, rehearsal.read_rehearsal(out)))
        return out / "tables.md"
    with _folder(config).begin(partial(_write_settings, config)):
        if plan.duel is not None:
            plan.duel.write_images()
        seconds = rehearsal.rehearse(plan, out)
        jobs = {
            name: dataclasses.replace(job, work=rehearsal.job_duration(job, name, seconds))
            for name, job in plan.jobs.items()
        }
        show(rehearsal.remaining_time(plan, seconds))
        cost = run_all(jobs, out, plan.gpus_per_run)
        return _write_tables(plan, cost, out)


def _preflight(config: ReproduceConfig) -> Plan:
    preflight = Preflight()
    paper_tables = preflight.check(lambda: chosen_tables(config.tables))
    splits = preflight.check(lambda: open_readable(config.data, config.value_range))
    preflight.check(_folder(config).check)
    plan = None
    if paper_tables is not None and splits is not None:
        plan = preflight.check(partial(Plan, config, paper_tables, splits))
    if plan is not None:
        _check_perceptual_networks(plan, preflight)
    preflight.finish()
    assert plan is not None
    assert splits is not None
    show_source(splits)
    return plan


def _check_perceptual_networks(plan: Plan, preflight: Preflight) -> None:
    """Check that the user's perceptual networks fit the images of their codebooks; networks trained here always do."""
    to_check = {}
    for job in plan.jobs.values():
        if job.command == "codebook" and not job.needs and not job.finished:
            perceptual = job.config.perceptual
            to_check[perceptual.network, perceptual.layers, perceptual.weights, job.config.image_size] = job.config
    for settings in to_check.values():
        preflight.check(partial(_check_codebook, settings))


def _check_codebook(settings: CodebookConfig) -> None:
    try:
        CodebookStage.check(settings)
    except PecobookError as error:  # the message names the flags of `codebook`, which differ here
        text = str(error).replace("--perceptual.layers", "--network-layers")
        raise ConfigError(text.replace("--perceptual.weights", "--network-weights")) from None


def _fixed_settings(config: ReproduceConfig) -> dict[str, Any]:
    """Return the settings that must not change when a folder is resumed."""
    free = ("tables", "out", "seeds", "transfer", "dry_run", "gpus_per_run", "micro_batch_size", "compile")
    return {name: value for name, value in to_dict(config).items() if name not in free}


def command_line(config: ReproduceConfig) -> str:
    """Return the command that gives these tables, without its --out."""
    always, never = ("data", "budget", "seeds"), ("tables", "out", "dry-run")
    words = flag_words(config, ReproduceConfig(), always=always, never=never)
    return " ".join(["pecobook reproduce", *config.tables, words])


def _folder(config: ReproduceConfig) -> OutputFolder:
    settings, defaults = _fixed_settings(config), _fixed_settings(ReproduceConfig())
    return resumed_folder(
        config.out, settings, defaults, data=config.data, example="runs/tables", kind="tables", marker="reproduce.json"
    )


def _write_settings(config: ReproduceConfig, out: Path) -> None:
    write_json(out / "reproduce.json", _fixed_settings(config))
    (out / "runs").mkdir(exist_ok=True)


def _write_tables(plan: Plan, cost: dict[str, float], out: Path) -> Path:
    """Write all tables and the report; returns the Markdown file."""
    introduction = (
        f"`{command_line(plan.config)}`. After ± stands the standard deviation over seeds. The paper's numbers are of "
        "ImageNet-1K and its full budget: compare differences and orders, not values."
    )
    measured_tables = tables.measured_tables(plan)
    text = tables.markdown(measured_tables, introduction)
    write_atomically(out / "tables.md", text.encode())
    write_atomically(out / "tables.csv", tables.comma_separated(measured_tables).encode())
    sections = []
    for measured in measured_tables:
        header, rows = tables.header_and_rows(measured)
        plot, title = tables.plot(measured), measured.table.title
        write_pictures(out, {f"{measured.name}.png": plot})
        lines = [measured.table.note, *tables.remarks(measured), *tables.gains_over_controls(measured)]
        picture = Picture(plot, "Points: mean over seeds; bars: standard deviation over seeds.", title)
        sections.append(Section(title, "\n\n".join(lines), (picture,), Table(header, tuple(rows))))
    total = sum(cost.values())
    times = Table(("Run", "Time"), tuple((name, duration(seconds)) for name, seconds in cost.items()))
    sections.append(Section("Cost", f"All runs together: {duration(total)}.", table=times))
    report = Report("The paper's tables, measured again", plan.config.data, (introduction,), (), tuple(sections))
    write_report(out, report)
    show(text)
    show(f"Done: {out / 'tables.md'}, tables.csv, report.html")
    return out / "tables.md"
