"""Kills: at crash points, at any time, by signals and by a power cut; then the end must be that of no kill."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaign.faults import Counter, at_event
from tests.campaign.process import Process
from tests.campaign.subjects import TRAININGS, Subject, last_lines
from tests.campaign.verdict import Case, Field, Verdict, judged

_WAIT_FOR_CHILDREN = 60.0
"""Seconds after a kill in which the children of the killed process must end."""


def at_crash_points(name: str) -> Case:
    """Kill before a random file event under --out, up to three times."""
    return functools.partial(_case, "killed before a file event", name, _crash_point)


def by_power_cuts(name: str) -> Case:
    """Kill before a random file event, and lose a part of what was not flushed to the disk."""
    return functools.partial(_case, "power cut", name, _power_cut)


def at_times(name: str) -> Case:
    """Kill at a random time, up to three times."""
    return functools.partial(_case, "killed at a random time", name, _random_time)


def by_signals(name: str) -> Case:
    """Stop by signals, also by two at once, after the process was halted and went on."""
    return functools.partial(_case, "signals", name, _signals)


def cases() -> list[Case]:
    """Return every kind of kill for every subject; short subjects more often."""
    short = (*TRAININGS, "tokenize")
    kinds: list[Callable[[str], Case]] = [at_crash_points, by_power_cuts, at_times, at_crash_points, by_signals]
    some = [kind(name) for kind in kinds for name in short]
    return [*some, *(kind("analyze") for kind in kinds[:4]), *(kind("demo") for kind in kinds[1:4])] + [
        kind("reproduce") for kind in kinds[1:4]
    ]


def _case(
    group: str,
    name: str,
    disturb: Callable[[Subject, Path, random.Random], Process],
    field: Field,
    chance: random.Random,
) -> Iterator[Verdict]:
    subject = field.subject(name)
    began, out = time.monotonic(), field.place() / "run"
    if name in ("demo", "reproduce"):
        _nearly_finish(field.materials.folder / "undisturbed" / name, out, chance)
    planned, kills, fault = chance.choice((1, 1, 2, 3)), 0, ""
    for _ in range(planned):
        process = disturb(subject, out, chance)
        fault = fault or _ending_fault(process)
        process.end()
        if process.code == 0:
            break
        kills += 1
    fault = fault or subject.finish(out)
    yield judged(group, f"{name}, {kills} times", began, fault, kills)
    if not fault:
        shutil.rmtree(out.parent)


def _nearly_finish(finished: Path, out: Path, chance: random.Random) -> None:
    """Copy the finished folder of demo or reproduce without one or two of its runs and without its results."""
    shutil.copytree(finished, out)
    runs = sorted(path.parent for path in [*out.glob("*/checkpoints"), *out.glob("runs/*/checkpoints")])
    for run in chance.sample(runs, chance.choice((1, 2))):
        shutil.rmtree(run)
    for name in ("results.json", "report.html", "tables.md", "tables.csv"):
        (out / name).unlink(missing_ok=True)


def _ending_fault(process: Process) -> str:
    """Return what is wrong after a disturbance: a traceback, another exit code, or children that stay."""
    code = process.code
    assert code is not None
    if code not in (0, 130, 143, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGUSR1, -signal.SIGINT):
        return f"ended with {code}: {last_lines(process.text)}"
    if "Traceback" in process.text:
        return f"a traceback: {last_lines(process.text)}"
    stop = time.monotonic() + _WAIT_FOR_CHILDREN
    while process.left():
        if time.monotonic() > stop:
            return f"{len(process.left())} children still run {_WAIT_FOR_CHILDREN:.0f} s after the kill"
        time.sleep(0.02)
    return ""


def _crash_point(subject: Subject, out: Path, chance: random.Random) -> Process:
    at = chance.randint(1, max(subject.events, 1))
    process = subject.start(out, prepare=at_event(out, at, "kill", Counter()))
    process.wait()
    return process


def _power_cut(subject: Subject, out: Path, chance: random.Random) -> Process:
    at = chance.randint(1, max(subject.events, 1))
    process = subject.start(out, prepare=at_event(out, at, "power_cut", Counter()))
    process.wait()
    return process


def _random_time(subject: Subject, out: Path, chance: random.Random) -> Process:
    process = subject.start(out)
    _sleep(process, chance.random() * subject.seconds)
    process.send(signal.SIGKILL)
    process.wait()
    return process


def _signals(subject: Subject, out: Path, chance: random.Random) -> Process:
    process = subject.start(out)
    _sleep(process, chance.random() * subject.seconds)
    term, interrupt, warning = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
    halt = chance.random() < 0.3
    if halt:
        process.send(signal.SIGSTOP)
        time.sleep(0.2)
    for number in chance.choice(((term,), (term, term), (interrupt, term), (warning,), (warning, term), (interrupt,))):
        process.send(number)
        time.sleep(chance.choice((0.0, 0.01, 0.1)))
    if halt:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)
    process.wait()
    return process


def _sleep(process: Process, seconds: float) -> None:
    stop = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < stop:
        time.sleep(0.003)
