"""`pecobook reproduce`: the paper's tables, trained again on your images, at a budget of yours, over seeds.

paper.py      the tables: rows and the paper's numbers
budgets.py    how large and how long everything is trained
plan.py       what is trained for which row, each run once
rehearsal.py  a few steps of each kind of run first
tables.py     the tables as Markdown, CSV and plots
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pecobook.errors import ConfigError, PecobookError, Preflight, RunFolderError
from pecobook.settings.reproduce import ReproduceConfig
from pecobook.settings.values import changed_settings, complete, flags, replace, to_dict

if TYPE_CHECKING:
    from pecobook.commands.reproduce.paper import PaperTable
    from pecobook.commands.reproduce.plan import Plan
    from pecobook.commands.reproduce.tables import Measured
    from pecobook.settings.codebook import CodebookConfig
    from pecobook.utils.output_folder import OutputFolder

__all__ = ["ReproduceConfig", "reproduce"]


def reproduce(config: ReproduceConfig | None = None, **settings: Any) -> Path:
    """Train what is missing, and write `tables.md`, `tables.csv`, pictures and `report.html`; returns the Markdown.

    Raises:
        PreflightError: problems found before anything was written, all of them.
        PecobookError: a run that failed.
    """
    from pecobook.commands.jobs import run_all, say
    from pecobook.commands.reproduce.paper import chosen_tables
    from pecobook.commands.reproduce.rehearsal import describe, how_long, rehearse, rehearsed, work
    from pecobook.commands.reproduce.tables import measured

    config = replace(config or ReproduceConfig(), settings)
    plan = _preflight(config)
    say(describe(plan))
    out = Path(config.out)
    if config.dry_run:
        say(how_long(plan, rehearsed(out)))
        return out / "tables.md"
    with _folder(config).begin(partial(_write_first, config)):
        seconds = rehearse(plan, out)
        jobs = {name: dataclasses.replace(job, work=work(job, name, seconds)) for name, job in plan.jobs.items()}
        say(how_long(plan, seconds))
        cost = run_all(jobs, out, plan.gpus_per_run)
        return write(config, measured(plan, chosen_tables(config.tables)), cost, out)


def _preflight(config: ReproduceConfig) -> Plan:
    from pecobook.commands.reproduce.plan import Plan
    from pecobook.data.images import open_readable

    found = Preflight()
    tables = found.check(lambda: _named_tables(config))
    splits = found.check(lambda: open_readable(config.data))
    found.check(_folder(config).check)
    plan = None
    if tables is not None and splits is not None:
        plan = found.check(partial(Plan, config, tables, splits))
    if plan is not None:
        _check_perceptual(plan, found)
    found.finish()
    assert plan is not None
    return plan


def _named_tables(config: ReproduceConfig) -> dict[str, PaperTable]:
    from pecobook.commands.reproduce.paper import TABLES, chosen_tables

    if not config.tables:
        raise ConfigError(f"Name tables: pecobook reproduce table4 ... Known: {', '.join(TABLES)}.")
    return chosen_tables(config.tables)


def _check_perceptual(plan: Plan, found: Preflight) -> None:
    """Whether given perceptual networks can look at the images of their codebooks; those that are trained here can."""
    checked = {}
    for job in plan.jobs.values():
        if job.command == "codebook" and not job.needs and not job.finished:
            seen = job.config.perceptual
            checked[seen.network, seen.layers, seen.weights, job.config.image_size] = job.config
    for settings in checked.values():
        found.check(partial(_check_codebook, settings))


def _check_codebook(settings: CodebookConfig) -> None:
    from pecobook.stages.codebook import CodebookStage

    try:
        CodebookStage.check(settings)
    except PecobookError as error:  # said of codebook's flags, whose names are others here
        text = str(error).replace("--perceptual.layers", "--network-layers")
        raise ConfigError(text.replace("--perceptual.weights", "--network-weights")) from None


def _fixed(config: ReproduceConfig) -> dict[str, Any]:
    """What must stay as it is when a folder is gone on with."""
    free = ("tables", "out", "seeds", "transfer", "dry_run", "gpus_per_run", "micro_batch_size", "compile")
    return {name: value for name, value in to_dict(config).items() if name not in free}


def command_line(config: ReproduceConfig) -> str:
    """The command that gives these tables, but for its folder."""
    words = ["pecobook reproduce", *config.tables]
    for name in flags(ReproduceConfig):
        value, usual = (attrgetter(name.replace("-", "_"))(one) for one in (config, ReproduceConfig()))
        if name in ("tables", "out", "dry-run") or (value == usual and name not in ("data", "budget", "seeds")):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name}", *(shlex.quote(str(one)) for one in values)]
    return " ".join(words)


def _folder(config: ReproduceConfig) -> OutputFolder:
    from pecobook.utils.output_folder import OutputFolder

    return OutputFolder(
        config.out,
        example="runs/tables",
        kind="tables",
        marker="reproduce.json",
        always_resumes=True,
        check_resume=partial(_check_unchanged, config),
    )


def _check_unchanged(config: ReproduceConfig, old: dict[str, Any]) -> None:
    changed = changed_settings(complete(old, _fixed(ReproduceConfig())), _fixed(config))
    if changed:
        raise RunFolderError(
            f"--out '{config.out}' was begun with other settings: {'; '.join(changed)}. Name another folder."
        )


def _write_first(config: ReproduceConfig, out: Path) -> None:
    from pecobook.utils.files import write_atomically

    (out / "runs").mkdir(exist_ok=True)
    write_atomically(out / "reproduce.json", (json.dumps(_fixed(config), indent=2) + "\n").encode())


def write(config: ReproduceConfig, found: list[Measured], cost: dict[str, float], out: Path) -> Path:
    """Write all tables; returns the Markdown."""
    from pecobook.analysis.report import Picture, Report, Section, Table, write_report
    from pecobook.analysis.wording import duration
    from pecobook.commands.jobs import say
    from pecobook.commands.reproduce import tables
    from pecobook.utils.files import write_atomically

    about = (
        f"`{command_line(config)}`. After ± stands the standard deviation over seeds. The paper's numbers are of "
        "ImageNet-1K and its full budget: compare differences and orders, not values."
    )
    text = tables.markdown(found, about)
    write_atomically(out / "tables.md", text.encode())
    write_atomically(out / "tables.csv", tables.comma_separated(found).encode())
    sections = []
    (out / "pictures").mkdir(exist_ok=True)
    for one in found:
        header, rows = tables.lines_of(one)
        picture = tables.plot(one)
        write_atomically(out / "pictures" / f"{one.name}.png", picture)
        words = "\n\n".join([one.table.note, *tables.remarks(one), *tables.gains_over_controls(one)])
        shown = Picture(picture, "Points: mean over seeds; bars: its standard deviation.", one.table.title)
        sections.append(Section(one.table.title, words, (shown,), Table(header, tuple(rows))))
    total = sum(cost.values())
    spent = Table(("Run", "Time"), tuple((name, duration(value)) for name, value in cost.items()))
    sections.append(Section("Cost", f"All runs together: {duration(total)}.", table=spent))
    write_report(out, Report("The paper's tables, measured again", config.data, (about,), (), tuple(sections)))
    say(text)
    say(f"Done: {out / 'tables.md'}, tables.csv, report.html")
    return out / "tables.md"
