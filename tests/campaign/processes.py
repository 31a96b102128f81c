"""Killed data-loading processes and ranks, changed data, and a folder that two commands want."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.campaign.process import Process
from tests.campaign.subjects import TRAININGS, Subject, changed, last_lines
from tests.campaign.verdict import Case, Field, Verdict, cleaned, judged, refusal_fault

_BOUND = 90.0
"""Seconds in which all ranks must end when one was killed."""


def cases() -> list[Case]:
    """Return the cases."""
    workers = [functools.partial(_worker, name) for name in ("contrast", "codebook", "pretrain", "finetune")]
    ranks = [functools.partial(_rank, name, number) for name in ("codebook", "finetune") for number in (0, 1)]
    changes = [functools.partial(_changed_data, change) for change in _CHANGES]
    return [*workers, *ranks, *changes, _two_at_once]


def _wait_for_steps(process: Process, out: Path, number: int) -> None:
    """Wait until a run has logged so many steps, or has ended."""
    while process.poll() is None:
        with contextlib.suppress(OSError):
            if (out / "metrics.jsonl").read_bytes().count(b"\n") >= number:
                return
        time.sleep(0.003)


def _worker(name: str, field: Field, chance: random.Random) -> Iterator[Verdict]:
    """A data-loading process is killed, as by a lack of memory: the run says so in a sentence, and can be resumed."""
    subject, began, out = field.subject(name), time.monotonic(), field.place() / "run"
    words = changed(subject.words, {"--workers": "2", "--max-steps": "200", "--save-every": "100"})
    process = Process([*words, "--out", str(out)], out.parent / "log")
    _wait_for_steps(process, out, 2)
    for pid in process.left()[: chance.choice((1, 2))]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    code = process.wait()
    process.end()
    fault = refusal_fault(code, process.text, ["memory", "killed"], at_start=False)
    yield cleaned(judged("killed data worker", name, began, fault, 1), out.parent)


def _ranks(subject: Subject, out: Path) -> list[Process]:
    """Start two processes of one run as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environments = [{**world, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0"} for rank in ("0", "1")]
    words = [*subject.words, "--out", str(out)]
    return [
        Process(words, out.parent / f"rank-{rank}.log", environment=environment)
        for rank, environment in enumerate(environments)
    ]


def _rank(name: str, number: int, field: Field, chance: random.Random) -> Iterator[Verdict]:
    """A rank is killed: the other ends in bounded time, and two new ranks end as two undisturbed ones."""
    subject, began, place = field.subject(name), time.monotonic(), field.place()
    straight = _ranks(subject, place / "straight")
    fault = "" if [rank.wait() for rank in straight] == [0, 0] else last_lines(straight[0].text)
    alone = time.monotonic() - began
    out = place / "run"
    ranks = _ranks(subject, out)
    time.sleep(chance.random() * alone)
    ranks[number].send(signal.SIGKILL)
    killed = time.monotonic()
    for rank in ranks:
        try:
            rank.wait(_BOUND)
        except TimeoutError:
            fault = fault or f"rank {1 - number} was still there {_BOUND:.0f} s after rank {number} was killed"
    seconds = time.monotonic() - killed
    for rank in ranks:
        rank.end()
    said = ranks[1 - number].text
    fault = fault or next((f"says {word}" for word in ("Traceback", "frame #") if word in said), "")
    again = _ranks(subject, out)
    codes = [rank.wait() for rank in again]
    for rank in again:
        rank.end()
    if codes != [0, 0]:
        fault = fault or f"the restart ended with {codes}: {last_lines(again[0].text)}"
    elif not fault and subject.outcome(out) != subject.outcome(place / "straight"):
        fault = "differs from two undisturbed ranks"
    yield cleaned(
        judged("killed rank", f"{name}, rank {number}, other left after {seconds:.0f} s", began, fault, 1), place
    )


# ---------------------------------------------------------------------------------------------------------------- data


def _fewer(folder: Path) -> None:
    (folder / "red" / "3.png").unlink()


def _more(folder: Path) -> None:
    shutil.copyfile(folder / "red" / "3.png", folder / "red" / "9.png")


def _replaced(folder: Path) -> None:
    (folder / "red" / "3.png").write_bytes((folder / "blue" / "3.png").read_bytes())


def _truncated(folder: Path) -> None:
    content = (folder / "red" / "3.png").read_bytes()
    (folder / "red" / "3.png").write_bytes(content[: len(content) // 2])


def _renamed(folder: Path) -> None:
    (folder / "red" / "3.png").rename(folder / "red" / "33.png")


def _moved_class(folder: Path) -> None:
    (folder / "red" / "3.png").rename(folder / "blue" / "8.png")


_CHANGES: tuple[Callable[[Path], None], ...] = (_fewer, _more, _replaced, _truncated, _renamed, _moved_class)


def _changed_data(change: Callable[[Path], None], field: Field, chance: random.Random) -> Iterator[Verdict]:
    """The images change while a run is interrupted: the resume refuses, says what differs, and takes the way out."""
    name = chance.choice(("contrast", "codebook", "pretrain", "finetune", "tokenize"))
    subject, began, place = field.subject(name), time.monotonic(), field.place()
    out, images = place / "run", field.materials.images
    data = field.materials.copy(images, place / "images")
    words = [str(data) if word == str(images) else word for word in subject.words] + ["--out", str(out)]
    process = Process(words, place / "log")
    if process.wait() != 0:
        raise RuntimeError(process.text)
    if name == "tokenize":
        sorted(out.glob("train/*.npy"))[0].unlink()
    else:
        shutil.rmtree(out / "export")
    change(data)
    process = Process(words, place / "log")
    code = process.wait()
    fault = refusal_fault(code, process.text, at_start=False)
    if not fault and name != "tokenize":
        process = Process([*words, "--accept-data-change"], place / "log")
        fault = "" if process.wait() == 0 else f"with --accept-data-change: {last_lines(process.text)}"
    kind = change.__name__.strip("_").replace("_", " ")
    yield cleaned(judged("changed data", f"{name}, {kind}", began, fault), place)


def _two_at_once(field: Field, chance: random.Random) -> Iterator[Verdict]:
    """Two commands want one folder: one trains, the other is refused, and the end is as ever."""
    subject = field.subject(chance.choice(TRAININGS))
    began, out = time.monotonic(), field.place() / "run"
    first = subject.start(out)
    _wait_for_steps(first, out, 1)
    second = Process([*subject.words, "--out", str(out)], out.parent / "second.log")
    codes = [second.wait(), first.wait()]
    fault = "" if codes == [2, 0] else f"exit codes {codes}"
    fault = fault or refusal_fault(2, second.text, ["Another process"], at_start=False) or subject.differences(out)
    yield cleaned(judged("two commands at once", subject.name, began, fault), out.parent)
