"""`pecobook reproduce`: train the runs of the paper's tables on your images, with a chosen budget and several seeds.

duel.py       our own study, in addition to the paper's tables
few_labels.py the images of its fine-tuning
budgets.py    the size and the length of every kind of run
plan.py       the runs of all rows, each run once
given.py      checks of what the user names for the runs
listing.py    the plan as text, as JSON and as a file of commands
slurm.py      the plan as a script for Slurm
rehearsal.py  a few steps of each kind of run before the runs start
tables.py     the tables as Markdown, CSV and plots

The rows and the paper's numbers are in `pecobook.commands.paper_tables`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shlex
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pecobook.analysis.report import Picture, Report, Section, Table, write_pictures, write_report
from pecobook.commands.jobs import Job, Outcome, run_all, seconds_of
from pecobook.commands.paper_tables import TABLES, PaperTable, chosen_tables
from pecobook.commands.reproduce import listing, rehearsal, slurm, tables
from pecobook.commands.reproduce.few_labels import FOLDERS, write_images
from pecobook.commands.reproduce.given import check_given
from pecobook.commands.reproduce.plan import Plan
from pecobook.commands.resumed_folder import begin_or_resume, resumed_folder
from pecobook.data.images import expand_pattern
from pecobook.engine.log import compact_duration
from pecobook.engine.preamble import show_source
from pecobook.engine.value_range import open_readable
from pecobook.errors import ConfigError, DataError, PecobookError, Preflight, some_of
from pecobook.settings.reproduce import ReproduceConfig
from pecobook.settings.values import replace, to_dict
from pecobook.utils.extras import require
from pecobook.utils.files import write_atomically
from pecobook.utils.folder_lock import FolderLock
from pecobook.utils.json_files import TEXT, list_of, read_json
from pecobook.utils.output_folder import SHARED_WAIT, OutputFolder, check_new_file
from pecobook.utils.printer import show


def reproduce(config: ReproduceConfig | None = None, **settings: Any) -> Path:
    """Train the missing runs; write `tables.md`, `tables.csv`, pictures and `report.html`; return the Markdown file.

    Raises:
        PreflightError: lists all problems that were found before anything was written.
        PecobookError: a run failed or, with `train` False, is not finished; the tables of the others are written.
    """
    config = _with_full_paths(replace(config or ReproduceConfig(), settings))
    plan = _preflight(config)
    out = Path(config.out)
    if config.json:
        show(listing.as_json(plan), stdout=True)
    else:
        show(listing.describe(plan, every_arm=config.dry_run))
    if config.commands or config.slurm:
        _write_plan(plan)
    elif config.dry_run:
        show(rehearsal.remaining_time(plan, rehearsal.read_rehearsal(out)))
    else:
        _begin(plan)
        outcome = _run(plan, out) if config.train else Outcome()
        with FolderLock(out, shared=True, wait=10 * SHARED_WAIT):  # other machines write them at the same time
            _write_tables(plan, outcome, out)
        outcome.check(out)
        missing = [name for name, job in plan.jobs.items() if not job.finished]
        if missing:
            names = some_of(missing, 5)
            raise PecobookError(f"The tables leave out {len(missing)} runs that are not finished: {names}.")
    return out / "tables.md"


def _with_full_paths(config: ReproduceConfig) -> ReproduceConfig:
    """Return the settings with absolute paths, so that every job can be started in any folder."""
    full = {"out": str(Path(config.out).absolute())} if config.out else {}
    for name, value in to_dict(config).items():
        if isinstance(value, str) and name != "budget" and value not in ("", "photos", "random"):
            path = str(Path(value).absolute())
            with contextlib.suppress(OSError, DataError):  # a name too long for a file, or missing shards
                full |= {name: path} if Path(path).exists() or expand_pattern(path) else {}
    return replace(config, full)


def _run(plan: Plan, out: Path) -> Outcome:
    seconds = rehearsal.rehearse(plan, out)
    jobs = plan.jobs  # without a rehearsal all runs count equally
    if seconds:
        jobs = {
            name: dataclasses.replace(job, work=rehearsal.job_duration(job, name, seconds))
            for name, job in plan.jobs.items()
        }
        show(rehearsal.remaining_time(plan, seconds))
    return run_all(jobs, out, plan.gpus_per_run)


def _write_plan(plan: Plan) -> None:
    """Write the files of --commands and --slurm, and create the folder that their jobs will write to."""
    _begin(plan)
    for name, text in ((plan.config.commands, listing.commands), (plan.config.slurm, slurm.script)):
        if name:
            write_atomically(Path(name), text(plan).encode())
            show(f"Written: {name}")


def _check_file(flag: str, name: str) -> None:
    """Refuse a file that exists already, unless it is a plan of this command."""
    file = Path(name)
    if not (file.is_file() and listing.HEADER in file.read_text(errors="replace")[:200]):
        check_new_file(name, flag)


def _preflight(config: ReproduceConfig) -> Plan:
    preflight = Preflight()
    preflight.check(lambda: require("analysis", "pecobook reproduce"))
    paper_tables = preflight.check(lambda: chosen_tables(config.tables))
    splits = preflight.check(lambda: open_readable(config.data, config.value_range))
    preflight.check(_folder(config, paper_tables or ()).check)
    for flag, name in (("commands", config.commands), ("slurm", config.slurm)):
        preflight.check(partial(_check_file, flag, name))
    if config.commands and Path(config.commands).resolve() == Path(config.slurm).resolve():
        preflight.problems.append(ConfigError("--commands and --slurm name one file: give each its own."))
    plan = None
    if paper_tables is not None and splits is not None:
        plan = preflight.check(partial(Plan, config, paper_tables, splits))
    if plan is not None:
        _check_plan(plan, preflight)
    preflight.finish()
    assert plan is not None
    assert splits is not None
    show_source(splits)
    return plan


def _check_plan(plan: Plan, preflight: Preflight) -> None:
    config = plan.config
    check_given(plan, preflight, download=config.train and not (config.dry_run or config.commands or config.slurm))
    if not plan.jobs:
        preflight.problems.append(ConfigError("\n".join(["There is nothing to run.", *plan.left_out()])))
    names = [config.data, config.out, str(Path.cwd()), *(name for job in plan.jobs.values() for name in job.words)]
    broken = next((name for name in names if "\n" in name), None)
    if broken is not None and (config.commands or config.slurm):
        flag = "commands" if config.commands else "slurm"
        preflight.problems.append(ConfigError(f"--{flag}: {broken!r} has a line break: rename it."))


_RECORD = "reproduce.json"
_OPTIONAL = ("dino", "dalle", "more_data", "segmentation_", "detection_data", "kinetics", "ssv2")
"""Beginnings of names of settings that add rows or columns and change no others."""


def _folder(config: ReproduceConfig, tables: Iterable[str]) -> OutputFolder:
    """Return the rules for the folder."""
    rules: dict[str, Any] = {"example": "runs/tables", "kind": "tables", "marker": _RECORD, "shared": True}
    rules |= {"schema": {"asked": list_of(TEXT).or_none}, "data": config.data}
    return resumed_folder(config.out, _record(config, tables), _record(ReproduceConfig(), ()), _join, **rules)


def _begin(plan: Plan) -> None:
    """Create or continue the folder; it is not locked afterwards, since other processes may run its jobs too."""
    config, out = plan.config, Path(plan.config.out)
    with begin_or_resume(_folder(config, plan.tables), config, plan.splits, _record(config, plan.tables)):
        (out / "runs").mkdir(exist_ok=True)
        for kind in {name.partition("-")[0] for name in plan.jobs} & FOLDERS.keys():
            write_images(plan.splits, kind, out)


def _plans_of_folder(plan: Plan) -> list[Plan]:
    """Return plans of all tables that were asked for in the folder, one for the tables with the same seeds."""
    record = read_json(Path(plan.config.out) / _RECORD, {"asked": list_of(TEXT)})
    sources = {name: value for name, value in record.items() if name.startswith(_OPTIONAL)}
    groups: dict[tuple[tuple[int, ...], bool], dict[str, PaperTable]] = {}
    for name, table in TABLES.items():
        asked = [re.fullmatch(rf"{name} (\d+)( transfer)?", text) for text in record["asked"]]
        if seeds := {int(match[1]): bool(match[2]) for match in asked if match}:
            groups.setdefault((tuple(sorted(seeds)), any(seeds.values())), {})[name] = table
    plans = []
    for (numbers, transfer), group in groups.items():
        changes = {**sources, "tables": tuple(group), "seeds": numbers, "transfer": transfer}
        plans.append(Plan(replace(plan.config, changes), group, plan.splits, opens=False))
    return plans


def _record(config: ReproduceConfig, tables: Iterable[str]) -> dict[str, Any]:
    """Return the settings that must not change when a folder is resumed, and what a command asks for: tables, each with
    a seed, and with `transfer` if ViTs are pre-trained for it.
    """
    run = ("tables", "out", "seeds", "transfer", "gpus_per_run", "micro_batch_size", "compile")
    start = ("train", "dry_run", "json", "commands", "slurm", "verify_data", "accept_data_change")
    fixed = {name: value for name, value in to_dict(config).items() if name not in (*run, *start)}
    end = " transfer" if config.transfer else ""
    return fixed | {"asked": [f"{table} {seed}{end}" for table in tables for seed in config.seeds]}


def _join(record: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return a record with the sources that it leaves out, and with what both ask for."""
    joined = record | {"asked": sorted({*record["asked"], *other["asked"]})}
    for group in ([name for name in record if name.startswith(start)] for start in _OPTIONAL):
        if not any(record[name] for name in group):
            joined |= {name: other[name] for name in group}
    return joined


def _missing(jobs: Mapping[str, Job], outcome: Outcome) -> str:
    """Return a paragraph on the unfinished runs, which the tables leave out; empty if there are none."""
    missing = {name: job for name, job in jobs.items() if not job.finished}
    if not missing:
        return ""
    lines = [f"**{len(missing)} of {len(jobs)} runs are not finished, and the tables leave them out:**\n"]
    for name, job in missing.items():
        needed = outcome.not_run.get(name) or next((need for need in job.needs if need in missing), "")
        reason = f"needs `{needed}`" if needed else "failed" if name in outcome.failed else "not finished"
        lines.append(f"- `{name}`: {reason}")
    return "\n".join(lines)


def _write_tables(plan: Plan, outcome: Outcome, out: Path) -> None:
    """Write all tables of the folder, those of earlier commands too, and the report."""
    plans, config = _plans_of_folder(plan), plan.config
    jobs = {name: job for part in plans for name, job in part.jobs.items()}
    written_by = "; ".join(f"`{shlex.join(listing.command_words(part.config))}`" for part in plans)
    introduction = (
        f"{written_by}. After ± stands the standard deviation over seeds. The paper's numbers are of ImageNet-1K and "
        "its full budget: compare differences and orders, not values."
    )
    if config.budget != "paper" or config.length != 1 or config.backbone.name:
        introduction += (
            " ViTs and epochs in titles and rows are the paper's: here other ViTs may stand for them, and the lengths "
            "of pre-trainings have the same proportions."
        )
    measured_tables = [measured for part in plans for measured in tables.measured_tables(part)]
    measured_tables.sort(key=lambda measured: list(TABLES).index(measured.name))
    notes = tuple(filter(None, (introduction, _missing(jobs, outcome))))
    text = tables.markdown(measured_tables, "\n\n".join(notes))
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
    cost = seconds_of(jobs)
    times = Table(("Run", "Time"), tuple((name, compact_duration(seconds)) for name, seconds in cost.items()))
    sections.append(Section("Cost", f"All runs together: {compact_duration(sum(cost.values()))}.", table=times))
    report = Report("The paper's tables, measured again", config.data, notes, (), tuple(sections))
    write_report(out, report)
    show(text)
    show(f"Done: {out / 'tables.md'}, tables.csv, report.html")
