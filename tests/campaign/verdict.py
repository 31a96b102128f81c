"""The verdict of a case, and the table of all verdicts."""

from __future__ import annotations

import dataclasses
import random
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.campaign.materials import Materials
from tests.campaign.subjects import Subject, last_lines, subjects


class Field:
    """What every case gets: materials, subjects, chance, and a folder of its own."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.materials = Materials(folder / "materials")
        self._subjects: dict[str, Subject] = {}
        self._number = 0

    def subject(self, name: str) -> Subject:
        """Return the subject of this name, after an undisturbed run."""
        if name not in self._subjects:
            self._subjects |= subjects(self.materials, (name,))
        return self._subjects[name]

    def place(self) -> Path:
        """Return a new folder."""
        self._number += 1
        folder = self.folder / f"case-{self._number:04d}"
        folder.mkdir(parents=True)
        return folder


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a case has shown."""

    group: str
    case: str
    fault: str
    """What is wrong; empty when all is as it must be."""
    kills: int = 0
    """Number of kills and signals in the case."""
    seconds: float = 0.0


Case = Callable[[Field, random.Random], Iterable[Verdict]]
"""Returns verdicts. It draws what it does with the random numbers that it is given."""


def judged(group: str, name: str, began: float, fault: str, kills: int = 0) -> Verdict:
    """Return a verdict with its duration."""
    return Verdict(group, name, fault, kills, round(time.monotonic() - began, 2))


def cleaned(verdict: Verdict, folder: Path) -> Verdict:
    """Delete the folder of a case without a fault; return the verdict."""
    if not verdict.fault:
        shutil.rmtree(folder)
    return verdict


def refusal_fault(code: int, text: str, names: Iterable[str] = (), *, at_start: bool = True) -> str:
    """Return what is wrong with a refusal: it has code 2, at most three lines, and the words that must be in it.

    Args:
        code: exit code.
        text: what was written to the screen.
        names: texts of which the message must contain one; none for any message.
        at_start: whether the refusal is all that was written.
    """
    message = text if at_start else text[max(text.rfind("\npecobook: "), 0) :]
    lines = [line for line in message.splitlines() if line.strip()]
    if code != 2:
        return f"exit code {code}: {last_lines(text)}"
    if "Traceback" in text or "weights_only=False" in text:
        return f"a traceback: {last_lines(text)}"
    if len(lines) > 3:
        return f"{len(lines)} lines: {last_lines(text)}"
    if "\x1b" in text:
        return "an escape code on the screen"
    wanted = list(names)
    return "" if not wanted or any(name in text for name in wanted) else f"does not name {wanted}: {last_lines(text)}"


def table(verdicts: list[Verdict]) -> str:
    """Return the verdicts by group as a table, and a line for each fault."""
    groups: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault(verdict.group, []).append(verdict)
    width = max([len(group) for group in groups] + [20])
    lines = [f"{'':<{width}}  {'cases':>6}  {'as promised':>11}  {'kills':>6}  {'seconds':>8}"]
    rows = [*groups.items(), ("all", verdicts)]
    for group, members in rows:
        good = sum(not verdict.fault for verdict in members)
        kills, seconds = sum(verdict.kills for verdict in members), sum(verdict.seconds for verdict in members)
        lines.append(f"{group:<{width}}  {len(members):>6}  {good:>11}  {kills or '':>6}  {seconds:>8.0f}")
    faults = [f"{verdict.group}: {verdict.case}: {verdict.fault}" for verdict in verdicts if verdict.fault]
    return "\n".join([*lines, *(["", *faults] if faults else [])])
