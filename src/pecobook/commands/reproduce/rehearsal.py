"""Rehearsal: a few steps of each kind of run, to find failures and estimate the time before days are spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pecobook.commands.jobs import Job, gpu_slots, run_all, seconds_of
from pecobook.commands.reproduce.listing import kind_of
from pecobook.commands.reproduce.plan import Plan
from pecobook.engine.log import compact_duration
from pecobook.recipes import RECIPES
from pecobook.settings.values import replace, to_dict
from pecobook.utils.files import write_json
from pecobook.utils.folder_lock import FolderLock
from pecobook.utils.json_files import WHOLE, is_number, read_if_valid, read_json, read_metrics
from pecobook.utils.printer import show

_STEPS = 4
_WORTH = 50 * _STEPS
"""Minimum length of a plan's longest run, in steps, for a rehearsal; shorter runs reveal failures as quickly."""
_LONGEST = 24 * 3600.0
"""Seconds to wait for the rehearsal of another process."""
_SHORT: dict[str, dict[str, Any]] = {
    "analyze": {"max_train": 200, "max_test": 100},
    "predict": {"attack.max_images": 100},
}
_REHEARSED = (*RECIPES, *_SHORT)
"""Commands that are rehearsed. A token bank is not, since running the tokenizer in a ViT's steps takes longer; nor is a
probe, which is short."""
_SHORT_FACTOR = 10
"""Estimated time of a whole analysis relative to a rehearsed one. A whole analysis reads 20 to 50 times as many images,
but part of the time does not depend on the number of images."""


def remaining_time(plan: Plan, seconds: dict[str, float]) -> str:
    """Return a text on how long the unfinished jobs will take.

    Args:
        plan: the jobs.
        seconds: seconds of a step or of a small analysis by kind, as `rehearse` returns them.
    """
    unfinished = {name: job for name, job in plan.jobs.items() if not job.finished}
    if {kind_of(name) for name, job in unfinished.items() if job.command in _REHEARSED} - seconds.keys():
        return "how long it takes will be known after a few steps of each kind of run"
    left = sum(job_duration(job, name, seconds) * (1 - job.fraction_done) for name, job in unfinished.items())
    num_slots = len(gpu_slots(plan.gpus_per_run))
    runs = f"{num_slots} runs" if num_slots > 1 else "one run"
    return f"about {compact_duration(left)} of computing, {runs} at a time"


def read_rehearsal(out: Path) -> dict[str, float]:
    """Return the seconds by kind that an earlier `rehearse` wrote; empty if there was no rehearsal."""
    seconds = read_if_valid(out / "rehearsal.json") or {}  # a damaged file only costs another rehearsal
    return seconds if all(map(is_number, seconds.values())) else {}


def rehearse(plan: Plan, out: Path) -> dict[str, float]:
    """Run one job of each unfinished kind for a few steps; return the seconds per step or small analysis by kind.

    Plans with short runs are not rehearsed. ViTs are rehearsed without their token banks.

    Raises:
        PecobookError: a run failed.
    """
    folder = out / "rehearsal"
    folder.mkdir(parents=True, exist_ok=True)
    with FolderLock(folder, wait=_LONGEST):  # another process may rehearse the same kinds
        seconds = read_rehearsal(out)
        chosen: dict[str, str] = {}
        for name, job in plan.jobs.items():
            if kind_of(name) not in seconds and not job.finished and job.command in _REHEARSED:
                chosen.setdefault(kind_of(name), name)
        steps = [int(plan.jobs[name].config.max_steps) for name in chosen.values() if plan.jobs[name].trains]
        if not chosen or max(steps, default=_WORTH) < _WORTH:
            return seconds
        show("rehearsing each kind of run for a few steps")
        names, more = set[str](), set(chosen.values())
        while more:
            names |= more
            more = {need for name in more for need in _needs(plan, name)} - names
        jobs = {
            name: _short_job(job, _needs(plan, name), out / "runs", folder / "runs")
            for name, job in plan.jobs.items()
            if name in names
        }
        run_all(jobs, folder, plan.gpus_per_run).check(folder)
        cost = seconds_of(jobs)
        for kind, name in chosen.items():
            seconds[kind] = _seconds_per_step(jobs[name].out) if jobs[name].trains else cost[name]
        write_json(out / "rehearsal.json", seconds)
    return seconds


def _needs(plan: Plan, name: str) -> tuple[str, ...]:
    """Return the jobs that a job needs, with a token bank replaced by the jobs it needs."""
    needs = plan.jobs[name].needs
    parts = [plan.jobs[need].needs if plan.jobs[need].command == "tokenize" else (need,) for need in needs]
    return tuple(dict.fromkeys(need for part in parts for need in part))


def job_duration(job: Job, name: str, seconds: dict[str, float]) -> float:
    """Estimate the seconds of a whole job from the rehearsal; 0 for a kind that was not rehearsed."""
    unit = seconds.get(kind_of(name), 0.0)
    return unit * (int(job.config.max_steps) if job.trains else _SHORT_FACTOR)


def _short_job(job: Job, needs: tuple[str, ...], runs: Path, rehearsals: Path) -> Job:
    changes = {"max_steps": str(_STEPS), "log_every": 1} if job.trains else _SHORT[job.command]
    settings = move_paths(to_dict(job.config), runs, rehearsals)
    if "tokens" in settings and job.command == "pretrain":
        changes = {**changes, "tokens": ""}
    return Job(job.command, replace(replace(job.config, settings), changes), needs, job.accept_data_change)


def move_paths(value: Any, old: Path, new: Path) -> Any:
    """Return settings in which every path below `old` is moved below `new`."""
    if isinstance(value, dict):
        return {name: move_paths(part, old, new) for name, part in value.items()}
    if isinstance(value, str) and value.startswith(f"{old}/"):
        return str(new / Path(value).relative_to(old))
    return value


def _seconds_per_step(run: Path) -> float:
    batch_size = read_json(run / "config.json", {"batch_size": WHOLE})["batch_size"]
    speeds = [line["images_per_second"] for line in read_metrics(run / "metrics.jsonl") if "images_per_second" in line]
    return float(batch_size / max(speeds))  # the first step is slower than the others
