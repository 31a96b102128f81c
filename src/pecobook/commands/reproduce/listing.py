"""The plan as text: the cost of its jobs, as a table or as JSON, and as a file of commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pecobook.commands.jobs import Job
from pecobook.commands.reproduce.plan import Plan
from pecobook.engine.dry_run import size_text
from pecobook.models.cost import Cost
from pecobook.settings.reproduce import ReproduceConfig
from pecobook.settings.values import flag_words

_NOT_OF_THE_TABLES = (
    *("tables", "dry-run", "json", "commands", "slurm", "train"),
    *("verify-data", "accept-data-change"),
)
HEADER = "# The plan of: "
"""The beginning of the first line of a file of commands, and of the second line of a Slurm script."""


def command_words(config: ReproduceConfig, *, out: bool = False) -> list[str]:
    """Return the command for these tables, with or without its --out."""
    always = ("data", "budget", "seeds", *(["out"] if out else []))
    never = (*_NOT_OF_THE_TABLES, *([] if out else ["out"]))
    words = flag_words(config, ReproduceConfig(), always=always, never=never)
    return ["pecobook", "reproduce", *config.tables, *words]


def command_and_arm(name: str) -> tuple[str, str]:
    """Split a job's name into command and arm, without the seed."""
    command, _, arm = name.rpartition("-")[0].partition("-")
    return "analysis" if command == "judged" else command, arm


def kind_of(name: str) -> str:
    """Return the kind of a job, by its name: `codebook-pixel` for `codebook-pixel-0`, `analysis` for `judged-pixel-0`.

    Jobs of one kind take equally long: they differ only in the seed, or they are analyses.
    """
    command, arm = command_and_arm(name)
    return command if command == "analysis" else f"{command}-{arm}"


def describe(plan: Plan, *, every_arm: bool = False) -> str:
    """Return lines on the jobs and their cost, the finished jobs, and the figures that are not measured.

    With `every_arm` each arm's jobs have a separate line.
    """
    groups: dict[str, list[str]] = {}
    for name in plan.jobs:
        command, arm = command_and_arm(name)
        groups.setdefault(f"{command}-{arm}" if every_arm else command, []).append(name)
    seeds = len(plan.config.seeds)
    lines = [f"{len(plan.jobs)} runs for {seeds} seed{'s' if seeds != 1 else ''}:"]
    for group, names in groups.items():
        num_finished = sum(plan.jobs[name].finished for name in names)
        arms = ", ".join(dict.fromkeys(command_and_arm(name)[1] for name in names))
        finished = f", {num_finished} of them done" if num_finished else ""
        taken = _taken(plan.costs[name] for name in names)
        lines.append(f"  {len(names):4d} x {group}{finished}: {taken if every_arm else f'{arms} ({taken})'}")
    left = [name for name, job in plan.jobs.items() if not job.finished]
    if left:
        lines.append(f"What is left takes {_taken((plan.costs[name] for name in left), long=True)}.")
    return "\n".join([*lines, *plan.left_out()])


def _taken(costs: Iterable[Cost], *, long: bool = False) -> str:
    """Return the total cost of jobs: hours if all are known, otherwise operations; and bytes on disk."""
    costs = list(costs)
    in_hours = all(cost.hours is not None for cost in costs if cost.flop is not None)
    unknown = sum(cost.flop is None for cost in costs)
    if unknown == len(costs):
        return "an unknown cost" if long else "cost unknown"
    flop, disk = sum(cost.flop or 0.0 for cost in costs), size_text(sum(cost.disk for cost in costs))
    if in_hours:
        hours = sum(cost.hours or 0.0 for cost in costs)
        text = f"{hours:,.0f} GPU-hours" if hours >= 10 else f"{hours:.2g} GPU-hours"
        text = f"about {text} of an H200 ({flop:.2g} operations)" if long else text
    else:
        text = f"{flop:.2g} operations"
    text = f"{text} and {disk} of disk" if long else f"{text}, {disk}"
    return text + (f", not counting {unknown} of unknown cost" if unknown else "")


def as_json(plan: Plan) -> str:
    """Return the plan as a JSON object: `command`, the `folder` where it was given, and lists: `left_out`, the columns
    and the rows that are not measured, and `jobs`, each of which needs only earlier ones.
    """
    jobs = []
    for name, job in plan.jobs.items():
        cost, needs = plan.costs[name], list(job.needs)
        entry: dict[str, Any] = {"name": name, "command": command_line(job), "needs": needs, "finished": job.finished}
        hours = cost.hours and round(cost.hours, 3)
        jobs.append(entry | {"flop": cost.flop, "gpu_hours": hours, "disk_bytes": round(cost.disk)})
    command = shlex.join(command_words(plan.config, out=True))
    content = {"command": command, "folder": str(Path.cwd()), "left_out": plan.left_out(), "jobs": jobs}
    return json.dumps(content, indent=2)


def command_line(job: Job) -> str:
    """Return the command of a job, ready for a shell."""
    return shlex.join(["pecobook", *job.words])


def tables_line(plan: Plan) -> str:
    """Return the command that writes the tables from the finished jobs, ready for a shell."""
    return shlex.join([*command_words(plan.config, out=True), "--no-train"])


def commands(plan: Plan) -> str:
    """Return the unfinished jobs as shell lines, each with its name and the jobs that it needs as a comment."""
    left = {name: job for name, job in plan.jobs.items() if not job.finished}
    lines = [
        f"{HEADER}{shlex.join(command_words(plan.config, out=True))}",
        f"# Begun in the folder {shlex.quote(str(Path.cwd()))}. One job a line, which needs only earlier lines:",
        "# COMMAND  # NAME after NAMES. The jobs NAMES must finish first. An interrupted line may be run again.",
        "# Written again, this file has only what is missing. The last line writes the tables.",
    ]
    for name, job in left.items():
        needs = " ".join(need for need in job.needs if need in left)
        lines.append(f"{command_line(job)}  # {name}" + (f" after {needs}" if needs else ""))
    lines.append(f"{tables_line(plan)}  # tables after all")
    return "\n".join(lines) + "\n"
