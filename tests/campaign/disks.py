"""Disks: full, without inodes, read-only, broken, and folders that are removed while a run writes them."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaign.faults import Counter, at_event, failing, removing
from tests.campaign.subjects import TRAININGS, Subject
from tests.campaign.verdict import Case, Field, Verdict, cleaned, judged, refusal_fault

_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)
_BLOCKS_FREE = 64 * 1024 * 1024


def can_mount() -> bool:
    """Return whether this user may mount a file system in memory."""
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], check=False).returncode == 0


def cases() -> list[Case]:
    """Return every fault of a disk for every short subject."""
    names = ("codebook", *(name for name in TRAININGS if name != "codebook"), "tokenize")
    found: list[Case] = [functools.partial(_failing, name) for name in (*names, "analyze")]
    found += [functools.partial(_removed, name) for name in names]
    if can_mount():
        found += [functools.partial(_small_disk, name, inodes) for inodes in (False, True) for name in names]
    return found


def _failing(name: str, field: Field, chance: random.Random) -> Iterator[Verdict]:
    """From a random file event on, every write fails; when the disk is whole again, the end is as ever."""
    subject, began, out = field.subject(name), time.monotonic(), field.place() / "run"
    number = chance.choice(_ERRORS)
    at = chance.randint(1, subject.events)
    process = subject.start(out, prepare=at_event(out, at, failing(number), Counter()))
    code = process.wait()
    process.end()
    fault = refusal_fault(code, process.text, at_start=False) or subject.finish(out)
    yield cleaned(judged("failing disk", f"{name}, {errno.errorcode[number]} at event {at}", began, fault), out.parent)


def _removed(name: str, field: Field, chance: random.Random) -> Iterator[Verdict]:
    """The folder is removed while the command writes it: it says so, and the same command starts it again."""
    subject, began, out = field.subject(name), time.monotonic(), field.place() / "run"
    at = chance.randint(2, subject.events)
    process = subject.start(out, prepare=at_event(out, at, removing(out), Counter()))
    code = process.wait()
    process.end()
    fault = refusal_fault(code, process.text, at_start=False) if code else ""
    if code:
        shutil.rmtree(out, ignore_errors=True)
        fault = fault or subject.finish(out)
    yield cleaned(judged("removed folder", f"{name}, at event {at}", began, fault), out.parent)


def _small_disk(name: str, inodes: bool, field: Field, chance: random.Random) -> Iterator[Verdict]:
    """The disk, a small file system in memory, is too small; when it has grown, the run continues."""
    subject, began, place = field.subject(name), time.monotonic(), field.place()
    finished = list((field.materials.folder / "undisturbed" / name).rglob("*"))
    size = sum(path.stat().st_size for path in finished if path.is_file())
    limit = f"nr_inodes={chance.randint(4, len(finished))},size=64m"
    if not inodes:
        limit = f"size={max(int(size * chance.uniform(0.1, 0.9)), 16384)}"
    disk = place / "disk"
    disk.mkdir()
    with _mounted(disk, limit) as grow:
        fault = _filled(subject, disk / "run", grow)
    kind = "too few inodes" if inodes else "full disk"
    yield cleaned(judged(kind, f"{name}, {limit}", began, fault), place)


def _filled(subject: Subject, out: Path, grow: Callable[[], int]) -> str:
    process = subject.start(out)
    code = process.wait()
    process.end()
    log = process.text
    fault = refusal_fault(code, log, at_start=False) if code else ""
    grow()
    return fault or (subject.finish(out) if code else subject.differences(out))


@contextlib.contextmanager
def _mounted(folder: Path, options: str) -> Iterator[Callable[[], int]]:
    """Mount a file system in memory; yields a function that makes it large."""
    mount = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mount, options, "pecobook-campaign", str(folder)], check=True)
    try:
        large = ["mount", "-o", f"remount,size={_BLOCKS_FREE},nr_inodes=100000", str(folder)]
        yield lambda: subprocess.check_call(large)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
