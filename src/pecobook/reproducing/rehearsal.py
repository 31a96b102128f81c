"""A few steps of each kind of run, before days are spent on them: that they work, and how long they take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pecobook.analysis.charts import read_metrics
from pecobook.config import replace, to_dict
from pecobook.files import write_atomically
from pecobook.jobs import Job, run_all, say
from pecobook.reproducing.plan import Plan

_STEPS = 4
_ANALYSIS = {"max_train": 200, "max_test": 100}
_ANALYSIS_FACTOR = 10
"""A whole analysis reads 20 to 50 times the images, and part of its time does not depend on them."""


def kind_of(name: str) -> str:
    """Jobs that take alike: `network-resnet` of `network-resnet-0`, `codebook` of `codebook-pixel-0`."""
    head, _, rest = name.partition("-")
    if head == "network":
        return f"{head}-{rest.rpartition('-')[0]}"
    return "analysis" if head == "judged" else head


def describe(plan: Plan) -> str:
    """What will be trained, and what is there already."""
    kinds: dict[str, list[bool]] = {}
    for name, job in plan.jobs.items():
        kinds.setdefault(kind_of(name), []).append(job.finished)
    lines = [f"{len(plan.jobs)} runs for {len(plan.config.seeds)} seeds:"]
    for kind, done in kinds.items():
        lines.append(f"  {len(done):4d} x {kind}" + (f", {sum(done)} of them done" if any(done) else ""))
    return "\n".join(lines)


def rehearse(plan: Plan, out: Path) -> dict[str, float]:
    """Run one job of each kind for a few steps; returns the seconds of a step, or of a small analysis, by kind.

    Raises:
        PecobookError: a kind of run does not work.
    """
    file = out / "rehearsal.json"
    known: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    chosen: dict[str, str] = {}
    for name in plan.jobs:
        if kind_of(name) not in known:
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
    cost = run_all(short, folder)
    for kind, name in chosen.items():
        known[kind] = cost[name] if short[name].command == "analyze" else _seconds_a_step(short[name].out)
    write_atomically(file, (json.dumps(known, indent=2) + "\n").encode())
    return known


def work(job: Job, name: str, seconds: dict[str, float]) -> float:
    """Seconds that a job will take, by the rehearsal."""
    each = seconds[kind_of(name)]
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
