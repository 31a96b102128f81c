"""Commands as processes, side by side, in the order of what they need; what is finished is kept, what was interrupted
goes on.

Runs that do not need one another share the machine out: one for each GPU, or, on CPUs, one for every few cores, since
short trainings use one core each far better than many cores together.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from pecobook.engine.log import compact_duration
from pecobook.errors import PecobookError
from pecobook.settings.values import dump


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a command, and the jobs that must be finished before it."""

    command: str
    """A training command, whose length is in steps, or analyze."""
    config: Any
    """Its settings; `out` says where."""
    needs: tuple[str, ...] = ()
    work: float = 1.0
    """How long it takes beside other jobs; only used to say how long is left."""

    @property
    def out(self) -> Path:
        """Folder that it writes."""
        return Path(self.config.out)

    @property
    def finished(self) -> bool:
        """Whether all of it is there: its last file is."""
        return (self.out / ("report.html" if self.command == "analyze" else "export/config.json")).exists()

    @property
    def share(self) -> float:
        """How much of it is done, in [0, 1]."""
        if self.finished:
            return 1.0
        return 0.0 if self.command == "analyze" else last_step(self.out) / int(self.config.max_steps)


@dataclasses.dataclass(frozen=True)
class GpuSlot:
    """What one run may compute on."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()
    """As CUDA_VISIBLE_DEVICES names them; none where there are none."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables that keep a run to its place."""
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
        threads = str(len(self.cores))
        return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}


def gpu_slots(gpus_per_run: int = 1) -> list[GpuSlot]:
    """The machine shared out: a place for so many GPUs each, all of them in one where it has fewer; without GPUs for
    every four cores, at least two where there are two cores.

    All places have equally many cores; where they outnumber cores, each may use all.
    """
    from pecobook.utils import devices

    cores, gpus = devices.cores(), devices.gpus()
    each = min(gpus_per_run, len(gpus))
    count = len(gpus) // each if gpus else max(min(2, len(cores)), len(cores) // 4)
    share = len(cores) // count
    return [
        GpuSlot(cores[i * share : (i + 1) * share] if share else cores, gpus[i * each : (i + 1) * each])
        for i in range(count)
    ]


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP end the process as Ctrl-C does, with what must be done at its end."""
    if threading.current_thread() is not threading.main_thread():  # only there Python hears signals
        yield
        return

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@_ended_by_signals()
def run_all(jobs: Mapping[str, Job], out: Path, gpus_per_run: int = 1) -> dict[str, float]:
    """Run every job that is not finished; returns the seconds of each. Raises PecobookError when one fails."""
    free = gpu_slots(gpus_per_run)
    logs = out / "logs"
    logs.mkdir(exist_ok=True)
    waiting = {name: job for name, job in jobs.items() if not job.finished}
    running: dict[str, _Running] = {}
    progress = _Progress(jobs)
    try:
        while waiting or running:
            for name in [name for name, run in running.items() if run.process.poll() is not None]:
                ended = running.pop(name)
                ended.finish(name, logs)
                free.append(ended.slot)
            for name, job in list(waiting.items()):
                ready = all(jobs[need].finished for need in job.needs)
                if ready and free:
                    running[name] = _Running(name, waiting.pop(name), out, free.pop(0))
            progress.show()
            time.sleep(0.2)
    finally:
        for run in running.values():
            run.process.terminate()
        for run in running.values():
            run.process.wait()
        progress.close()
    return {name: _seconds(job) for name, job in jobs.items()}


class _Running:
    """A run that is going."""

    def __init__(self, name: str, job: Job, out: Path, slot: GpuSlot) -> None:
        self.slot = slot
        (out / "settings").mkdir(exist_ok=True)
        settings = out / "settings" / f"{name}.json"
        dump(job.config, settings)
        command = [sys.executable, "-m", "pecobook", job.command, "--config", str(settings)]
        if job.command == "analyze":
            shutil.rmtree(job.out, ignore_errors=True)  # what an interrupted one left
        elif (job.out / "config.json").exists():
            command.append("--resume")
        self.log: TextIO = (out / "logs" / f"{name}.log").open("a")
        environment = {**os.environ, **slot.environment}
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, env=environment)
        if hasattr(os, "sched_setaffinity"):  # its threads and data-loading processes will keep to them, too
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(self.process.pid, slot.cores)

    def finish(self, name: str, logs: Path) -> None:
        """Raise PecobookError unless the run ended well."""
        self.log.close()
        if self.process.returncode:
            last = [line for line in (logs / f"{name}.log").read_text().splitlines() if line.strip()][-3:]
            raise PecobookError(
                f"The run '{name}' failed; all it said stands in {logs / name}.log:\n" + "\n".join(last)
            )


class _Progress:
    """One line for all jobs: what runs, how far, how long still."""

    def __init__(self, jobs: Mapping[str, Job]) -> None:
        self.jobs, self.began, self.printed = jobs, time.monotonic(), -100.0
        self.total = sum(job.work for job in jobs.values())
        self.before = self._done()
        self.told: tuple[float, list[str]] | None = None
        self.status: Any = None
        if sys.stderr.isatty():
            from rich.console import Console

            self.status = Console(stderr=True).status("starting")
            self.status.start()

    def show(self) -> None:
        """Show the progress; at most every ten seconds where there is no terminal."""
        now = time.monotonic()
        if now - self.printed < (0.5 if self.status is not None else 10):
            return
        self.printed = now
        done = self._done()
        going = [f"{name} {100 * part:.0f}%" for name, job in self.jobs.items() if 0 < (part := job.share) < 1]
        speed = (done - self.before) / max(now - self.began, 1e-9)
        left = f", {compact_duration((self.total - done) / speed)} left" if done > self.before else ""
        line = f"{100 * done / self.total:3.0f}%{left}: " + ("; ".join(going) or "starting")
        if self.status is not None:
            self.status.update(line)
        elif (done, going) != self.told:  # a log of hours wants no line that says nothing new
            say(line)
        self.told = (done, going)

    def close(self) -> None:
        """Leave the line."""
        if self.status is not None:
            self.status.stop()

    def _done(self) -> float:
        return sum(job.work * job.share for job in self.jobs.values())


def last_step(run: Path) -> int:
    """Last logged step of a run, 0 before the first."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError, KeyError):
        return 0


def _seconds(job: Job) -> float:
    """What a job took, from its start to its end by the times of its files; of one that was resumed, what its logged
    steps took, since the time in which nothing ran is no cost.
    """
    if job.command == "analyze":
        return float(json.loads((job.out / "analysis.json").read_text())["seconds"])
    first, last, end = (
        (job.out / name).stat().st_mtime for name in ("config.json", "environment.json", "export/config.json")
    )
    return _logged_seconds(job.out) if last - first > 60 else max(end - first, 0.0)


def _logged_seconds(run: Path) -> float:
    from pecobook.analysis.charts import read_metrics

    batch_size = json.loads((run / "config.json").read_text())["batch_size"]
    total, before = 0.0, 0
    for line in read_metrics(run / "metrics.jsonl"):
        if line.get("images_per_second"):
            total += (line["step"] - before) * batch_size / line["images_per_second"]
            before = line["step"]
    return total


def say(text: str) -> None:
    """Tell the user."""
    print(text, file=sys.stderr, flush=True)
