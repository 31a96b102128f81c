"""The demo's runs as processes, side by side, each the real command; what is finished is kept.

On a CPU two one-thread processes are far faster than one process with two threads beside another busy one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from pecobook.config import dump, to_dict
from pecobook.demonstration.plan import DemoConfig, Job
from pecobook.engine.log import duration
from pecobook.errors import PecobookError, RunFolderError


def check(config: DemoConfig) -> None:
    """Look at the data and the output folder before anything is written. Raises PecobookError."""
    from pecobook.data.images import open_images
    from pecobook.stages.stage import look_at_images

    out = Path(config.out)
    if out.is_file():
        raise RunFolderError(f"--out '{out}' is a file: name a folder.")
    mark = out / "demo.json"
    if out.is_dir() and any(out.iterdir()) and not mark.exists():
        raise RunFolderError(f"--out '{out}' is not empty and holds no demo: name another folder.")
    if mark.exists() and json.loads(mark.read_text()) != to_dict(config):
        raise RunFolderError(f"--out '{out}' holds a demo with other settings: name another folder, or delete it.")
    look_at_images(open_images(config.data).train)
    try:
        out.mkdir(parents=True, exist_ok=True)
        dump(config, mark)
    except OSError as error:
        raise RunFolderError(f"--out '{out}' cannot be written: {error}") from None


def train_all(jobs: dict[str, Job], out: Path) -> dict[str, float]:
    """Train every run that is not finished; returns the seconds of each. Raises PecobookError when one fails."""
    import torch

    slots = 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)
    logs = out / "logs"
    logs.mkdir(exist_ok=True)
    waiting = {name: job for name, job in jobs.items() if not _finished(job)}
    running: dict[str, _Running] = {}
    progress = _Progress(jobs)
    try:
        while waiting or running:
            for name in [name for name, run in running.items() if run.process.poll() is not None]:
                running.pop(name).finish(name, logs)
            for name, job in list(waiting.items()):
                ready = all(_finished(jobs[need]) for need in job.needs)
                if ready and len(running) < slots:
                    running[name] = _Running(name, waiting.pop(name), out)
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

    def __init__(self, name: str, job: Job, out: Path) -> None:
        (out / "settings").mkdir(exist_ok=True)
        settings = out / "settings" / f"{name}.json"
        dump(job.config, settings)
        run = Path(job.config.out)
        command = [sys.executable, "-m", "pecobook", job.command, "tiny", "--config", str(settings)]
        if (run / "config.json").exists():
            command.append("--resume")
        self.log: TextIO = (out / "logs" / f"{name}.log").open("a")
        threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MKL_NUM_THREADS": "1"}
        environment = {**os.environ, **({} if _has_gpu() else threads)}
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, env=environment)

    def finish(self, name: str, logs: Path) -> None:
        """Raise PecobookError unless the run ended well."""
        self.log.close()
        if self.process.returncode:
            last = [line for line in (logs / f"{name}.log").read_text().splitlines() if line.strip()][-3:]
            raise PecobookError(
                f"The run '{name}' failed; all it said stands in {logs / name}.log:\n" + "\n".join(last)
            )


class _Progress:
    """One line for the whole demo: what runs, how far, how long still."""

    def __init__(self, jobs: dict[str, Job]) -> None:
        self.jobs, self.began, self.printed = jobs, time.monotonic(), -100.0
        self.total = sum(_work(job) for job in jobs.values())
        self.before = self._done()
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
        going = [f"{name} {step}/{job.config.max_steps}" for name, job in self.jobs.items() if (step := _step(job))]
        speed = (done - self.before) / max(now - self.began, 1e-9)
        left = f", {duration((self.total - done) / speed)} left" if done > self.before else ""
        line = f"{100 * done / self.total:3.0f}%{left}: " + ("; ".join(going) or "starting")
        if self.status is not None:
            self.status.update(line)
        else:
            say(line)

    def close(self) -> None:
        """Leave the line."""
        if self.status is not None:
            self.status.stop()

    def _done(self) -> float:
        shares = (
            (_work(job), 1.0 if _finished(job) else _step(job) / int(job.config.max_steps))
            for job in self.jobs.values()
        )
        return sum(work * share for work, share in shares)


# Relative cost of one image: measured on one core at the CPU's sizes, only used to say how long is left.
_COST = {"contrast": 1.0, "codebook": 3.5, "pretrain": 1.6}


def _work(job: Job) -> float:
    return _COST[job.command] * int(job.config.max_steps) * job.config.batch_size


def _finished(job: Job) -> bool:
    return (Path(job.config.out) / "export" / "config.json").exists()


def _step(job: Job) -> int:
    """Last logged step of a run that is going, 0 when it is not."""
    if _finished(job):
        return 0
    try:
        lines = (Path(job.config.out) / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError, KeyError):
        return 0


def _seconds(job: Job) -> float:
    """Wall-clock seconds from a run's start to its export, from the times of its files."""
    run = Path(job.config.out)
    return max((run / "export" / "config.json").stat().st_mtime - (run / "config.json").stat().st_mtime, 0.0)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def say(text: str) -> None:
    """Tell the user."""
    print(text, file=sys.stderr, flush=True)


__all__ = ["check", "duration", "say", "train_all"]
