"""Rehearsal: a few steps of each kind of run, to find failures and to estimate the time before days are spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pecobook.analysis.charts import read_metrics
from pecobook.commands.jobs import Job, gpu_slots, run_all
from pecobook.commands.reproduce.plan import Plan
from pecobook.engine.log import compact_duration
from pecobook.settings.values import replace, to_dict
from pecobook.utils.files import write_json
from pecobook.utils.json_files import WHOLE, is_number, read_if_valid, read_json
from pecobook.utils.printer import show

_STEPS = 4
_FEW_IMAGES = {"max_train": 200, "max_test": 100}
_CHANGES: dict[str, dict[str, Any]] = {"analyze": _FEW_IMAGES, "probe": _FEW_IMAGES, "tokenize": {"views": 1}}
"""Settings that make a job short, by its command; trainings take few steps."""
_ANALYSIS_FACTOR = 10
"""Estimated time of a whole analysis over that of a rehearsed analysis. A whole analysis reads 20 to 50 times the
images, but part of the time does not depend on the number of images."""


def kind_of(name: str) -> str:
    """Return the kind of a job, by its name: `codebook-pixel` for `codebook-pixel-0`, `analysis` for `judged-pixel-0`.

    Jobs of one kind take equally long: they differ only in the seed, or they are analyses.
    """
    command, arm = _command_and_arm(name)
    return command if command == "analysis" else f"{command}-{arm}"


def _command_and_arm(name: str) -> tuple[str, str]:
    """Split a job's name into command and arm, without the seed."""
    command, _, arm = name.rpartition("-")[0].partition("-")
    return "analysis" if command == "judged" else command, arm


def describe(plan: Plan) -> str:
    """Return lines on the runs that will be trained, the runs that are finished, and the missing figures."""
    groups: dict[str, list[str]] = {}
    for name in plan.jobs:
        groups.setdefault(_command_and_arm(name)[0], []).append(name)
    lines = [f"{len(plan.jobs)} runs for {len(plan.config.seeds)} seeds:"]
    for command, names in groups.items():
        num_finished = sum(plan.jobs[name].finished for name in names)
        arms = ", ".join(dict.fromkeys(_command_and_arm(name)[1] for name in names))
        finished = f", {num_finished} of them done" if num_finished else ""
        lines.append(f"  {len(names):4d} x {command}{finished}: {arms}")
    figures = [pair for table in plan.tables.values() for pair in table.figures]
    return "\n".join([*lines, *plan.unmeasured(figures)])


def remaining_time(plan: Plan, seconds: dict[str, float]) -> str:
    """Return a text on how long the unfinished jobs will take.

    Args:
        plan: the jobs.
        seconds: seconds of a step or of a small analysis by kind, as `rehearse` returns them.
    """
    unfinished = {name: job for name, job in plan.jobs.items() if not job.finished}
    if {kind_of(name) for name in unfinished} - seconds.keys():
        return "how long it takes will be known after a few steps of each kind of run"
    left = sum(job_duration(job, name, seconds) * (1 - job.fraction_done) for name, job in unfinished.items())
    num_slots = len(gpu_slots(plan.gpus_per_run))
    runs = f"{num_slots} runs" if num_slots > 1 else "one run"
    return f"about {compact_duration(left)} of computing, {runs} at a time"


def read_rehearsal(out: Path) -> dict[str, float]:
    """Return the seconds by kind that an earlier `rehearse` wrote; empty when there was no rehearsal."""
    seconds = read_if_valid(out / "rehearsal.json") or {}  # a damaged file means a rehearsal more
    return seconds if all(map(is_number, seconds.values())) else {}


def rehearse(plan: Plan, out: Path) -> dict[str, float]:
    """Run one job of each unfinished kind for a few steps; return the seconds of a step or a small analysis by kind.

    Raises:
        PecobookError: a run failed.
    """
    seconds = read_rehearsal(out)
    chosen: dict[str, str] = {}
    for name, job in plan.jobs.items():
        if kind_of(name) not in seconds and not job.finished:
            chosen.setdefault(kind_of(name), name)
    if not chosen:
        return seconds
    show("rehearsing each kind of run for a few steps")
    names = set(chosen.values())
    while more := {need for name in names for need in plan.jobs[name].needs} - names:
        names |= more
    folder = out / "rehearsal"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = {name: _short_job(job, out / "runs", folder / "runs") for name, job in plan.jobs.items() if name in names}
    cost = run_all(jobs, folder, plan.gpus_per_run)
    for kind, name in chosen.items():
        seconds[kind] = _seconds_per_step(jobs[name].out) if hasattr(jobs[name].config, "max_steps") else cost[name]
    write_json(out / "rehearsal.json", seconds)
    return seconds


def job_duration(job: Job, name: str, seconds: dict[str, float]) -> float:
    """Estimate the seconds of a whole job from the rehearsal; 0 for a finished job that was not rehearsed."""
    unit = seconds.get(kind_of(name), 0.0)
    return unit * (int(job.config.max_steps) if hasattr(job.config, "max_steps") else _ANALYSIS_FACTOR)


def _short_job(job: Job, runs: Path, rehearsals: Path) -> Job:
    changes = _CHANGES.get(job.command, {"max_steps": str(_STEPS), "log_every": 1})
    settings = move_paths(to_dict(job.config), runs, rehearsals)
    return Job(job.command, replace(job.config, {**settings, **changes}), job.needs)


def move_paths(value: Any, old: Path, new: Path) -> Any:
    """Return settings in which every path below `old` is the same path below `new`."""
    if isinstance(value, dict):
        return {name: move_paths(part, old, new) for name, part in value.items()}
    if isinstance(value, str) and value.startswith(f"{old}/"):
        return str(new / Path(value).relative_to(old))
    return value


def _seconds_per_step(run: Path) -> float:
    batch_size = read_json(run / "config.json", {"batch_size": WHOLE})["batch_size"]
    speeds = [line["images_per_second"] for line in read_metrics(run / "metrics.jsonl") if "images_per_second" in line]
    return float(batch_size / max(speeds))  # the first step is slower than the others
