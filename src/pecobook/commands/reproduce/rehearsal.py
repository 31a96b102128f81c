"""A few steps of each kind of run, before days are spent on them: that they work, and how long they take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pecobook.analysis.charts import read_metrics
from pecobook.commands.jobs import Job, gpu_slots, run_all, say
from pecobook.commands.reproduce.plan import Plan
from pecobook.engine.log import compact_duration
from pecobook.settings.values import replace, to_dict
from pecobook.utils.files import write_atomically

_STEPS = 4
_ANALYSIS = {"max_train": 200, "max_test": 100}
_ANALYSIS_FACTOR = 10
"""A whole analysis reads 20 to 50 times the images, and part of its time does not depend on them."""


def kind_of(name: str) -> str:
    """Jobs that take alike, those that differ in the seed alone, and all analyses: `codebook-pixel` of
    `codebook-pixel-0`, `analysis` of `judged-pixel-0`.
    """
    command, arm = _parts(name)
    return command if command == "analysis" else f"{command}-{arm}"


def _parts(name: str) -> tuple[str, str]:
    """Command and arm of a job's name."""
    command, _, arm = name.rpartition("-")[0].partition("-")
    return "analysis" if command == "judged" else command, arm


def describe(plan: Plan) -> str:
    """What will be trained, and what is there already."""
    groups: dict[str, list[str]] = {}
    for name in plan.jobs:
        groups.setdefault(_parts(name)[0], []).append(name)
    lines = [f"{len(plan.jobs)} runs for {len(plan.config.seeds)} seeds:"]
    for command, names in groups.items():
        done = sum(plan.jobs[name].finished for name in names)
        arms = ", ".join(dict.fromkeys(_parts(name)[1] for name in names))
        lines.append(f"  {len(names):4d} x {command}" + (f", {done} of them done" if done else "") + f": {arms}")
    figures = [pair for table in plan.tables.values() for pair in table.figures]
    return "\n".join([*lines, *plan.unmeasured(figures)])


def how_long(plan: Plan, seconds: dict[str, float]) -> str:
    """What is left to compute, in words."""
    kinds = {kind_of(name) for name, job in plan.jobs.items() if not job.finished}
    if kinds - seconds.keys():
        return "how long it takes will be known after a few steps of each kind of run"
    left = sum(work(job, name, seconds) * (1 - job.share) for name, job in plan.jobs.items() if not job.finished)
    beside = len(gpu_slots(plan.gpus_per_run))
    runs = f"{beside} runs" if beside > 1 else "one run"
    return f"about {compact_duration(left)} of computing, {runs} at a time"


def rehearsed(out: Path) -> dict[str, float]:
    """What `rehearse` measured before, by kind."""
    file = out / "rehearsal.json"
    found: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    return found


def rehearse(plan: Plan, out: Path) -> dict[str, float]:
    """Run one job of each unfinished kind for a few steps; returns the seconds of a step, or of a small analysis, by
    kind.

    Raises:
        PecobookError: a kind of run does not work.
    """
    known = rehearsed(out)
    chosen: dict[str, str] = {}
    for name, job in plan.jobs.items():
        if kind_of(name) not in known and not job.finished:
            chosen.setdefault(kind_of(name), name)
    if not chosen:
        return known
    say("rehearsing each kind of run for a few steps")
    names = set(chosen.values())
    while more := {need for name in names for need in plan.jobs[name].needs} - names:
        names |= more
    folder = out / "rehearsal"
    folder.mkdir(parents=True, exist_ok=True)
    short = {name: _short(job, out / "runs", folder / "runs") for name, job in plan.jobs.items() if name in names}
    cost = run_all(short, folder, plan.gpus_per_run)
    for kind, name in chosen.items():
        known[kind] = cost[name] if short[name].command == "analyze" else _seconds_a_step(short[name].out)
    write_atomically(out / "rehearsal.json", (json.dumps(known, indent=2) + "\n").encode())
    return known


def work(job: Job, name: str, seconds: dict[str, float]) -> float:
    """Seconds that a job will take, by the rehearsal; 0 of a finished one that had none."""
    each = seconds.get(kind_of(name), 0.0)
    return each * (_ANALYSIS_FACTOR if job.command == "analyze" else int(job.config.max_steps))


def _short(job: Job, runs: Path, rehearsals: Path) -> Job:
    changes = _ANALYSIS if job.command == "analyze" else {"max_steps": str(_STEPS), "log_every": 1}
    return Job(
        job.command, replace(job.config, {**_moved(to_dict(job.config), runs, rehearsals), **changes}), job.needs
    )


def _moved(value: Any, old: Path, new: Path) -> Any:
    """Settings with all paths below `old` below `new`."""
    if isinstance(value, dict):
        return {name: _moved(part, old, new) for name, part in value.items()}
    if isinstance(value, str) and value.startswith(f"{old}/"):
        return str(new / Path(value).relative_to(old))
    return value


def _seconds_a_step(run: Path) -> float:
    batch_size = json.loads((run / "config.json").read_text())["batch_size"]
    speeds = [line["images_per_second"] for line in read_metrics(run / "metrics.jsonl") if "images_per_second" in line]
    return float(batch_size / max(speeds))  # the first step is slower
