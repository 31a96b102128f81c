"""Mistakes on the command line: each is answered in at most three lines, and leaves nothing behind."""

from __future__ import annotations

import os
import random
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from tests.campaign.process import Process
from tests.campaign.verdict import Case, Field, Verdict, judged, refusal_fault
from tests.mistaken_inputs import make_folder
from tests.mistakes import MISTAKES


def cases() -> list[Case]:
    """Return one case, which makes all mistakes."""
    return [_all]


def _all(field: Field, _chance: random.Random) -> Iterator[Verdict]:
    materials, place = field.materials, field.place()
    folder = place / "folder"
    folder.mkdir()
    make_folder(folder, materials.images, materials.codebook, materials.vit, materials.classifier, materials.bank)
    before = _entries(folder)
    for line, value, remedy in MISTAKES:
        began = time.monotonic()
        process = Process(shlex.split(line), place / "log", prepare=lambda: os.chdir(folder))
        code = process.wait()
        fault = refusal_fault(code, process.text)
        missing = [part for part in (value, remedy) if part not in process.text]
        if not fault and missing:
            fault = f"does not say {missing}: {process.text[:300]}"
        left = _entries(folder) - before
        fault = fault or (f"leaves {sorted(left)[:3]}" if left else "")
        before |= left
        yield judged("mistake", line[:150], began, fault)


def _entries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
