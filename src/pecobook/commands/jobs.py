"""Run pecobook commands as parallel processes in the order of their dependencies; resume interrupted ones.

Finished jobs are not run again. Jobs that do not depend on each other share the machine: one job per GPU, or, on CPUs,
one job per few cores, since several short trainings on one core each are much faster than one after another on all
cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
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

from pecobook.data.tokens import bank_layouts, missing_shards, read_bank_config
from pecobook.engine.log import compact_duration
from pecobook.engine.world import environment_without_launcher
from pecobook.errors import DataError, PecobookError, RunFolderError
from pecobook.settings.values import changed_settings, complete, to_dict
from pecobook.utils.files import write_json
from pecobook.utils.json_files import NUMBER, OBJECT, WHOLE, list_of, metric_lines, read_json
from pecobook.utils.output_folder import OutputFolder
from pecobook.utils.parent import child_environment
from pecobook.utils.printer import show


def resumed_folder(out: str, settings: dict[str, Any], defaults: dict[str, Any], **rules: Any) -> OutputFolder:
    """Return the rules for the folder of a command that resumes its jobs where the folder has the same settings.

    Args:
        out: the folder.
        settings: settings that must not change when the command resumes; the marker holds them.
        defaults: default values of these settings.
        rules: `example`, `kind`, `marker` and `data` of `OutputFolder`.
    """

    def check_unchanged(old: dict[str, Any]) -> None:
        changed = changed_settings(complete(old, defaults), settings)
        if changed:
            raise RunFolderError(
                f"--out '{out}' was begun with other settings: {'; '.join(changed)}. Name another folder."
            )

    return OutputFolder(out, **rules, always_resumes=True, check_resume=check_unchanged)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a command, and the jobs that must be finished before it starts."""

    command: str
    """A training command, whose length is given in steps, or tokenize, probe or analyze."""
    config: Any
    """Settings of the command; `out` is the folder of the run."""
    needs: tuple[str, ...] = ()
    """Names of the jobs that must be finished before."""
    work: float = 1.0
    """Duration relative to the other jobs; only the estimate of the remaining time uses it."""

    @property
    def out(self) -> Path:
        """The folder that the job writes."""
        return Path(self.config.out)

    @property
    def finished(self) -> bool:
        """Whether everything that the command writes exists."""
        if self.command == "probe":
            return self.out.exists()
        if self.command == "tokenize":
            return bank_is_complete(self.out)
        return (self.out / ("report.html" if self.command == "analyze" else "export/config.json")).exists()

    @property
    def fraction_done(self) -> float:
        """The part of the job that is done, in [0, 1]."""
        if self.finished:
            return 1.0
        return _last_step(self.out) / int(self.config.max_steps) if hasattr(self.config, "max_steps") else 0.0


@dataclasses.dataclass(frozen=True)
class GpuSlot:
    """The cores and GPUs of one run."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()
    """Names as in CUDA_VISIBLE_DEVICES; empty on a machine without GPUs."""

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that confine a run to the slot."""
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
        threads = str(len(self.cores))
        return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}


def gpu_slots(gpus_per_run: int = 1) -> list[GpuSlot]:
    """Divide the machine into slots that have `gpus_per_run` GPUs each.

    A machine with fewer GPUs is one slot with all of them. A machine without GPUs has one slot per four cores, and at
    least two slots if it has two cores. All slots have equally many cores; if there are more slots than cores, each
    slot may use all cores.
    """
    from pecobook.utils import devices

    cores, gpus = devices.cores(), devices.gpus()
    num_gpus = min(gpus_per_run, len(gpus))
    num_slots = len(gpus) // num_gpus if gpus else max(min(2, len(cores)), len(cores) // 4)
    num_cores = len(cores) // num_slots
    return [
        GpuSlot(
            cores[slot * num_cores : (slot + 1) * num_cores] if num_cores else cores,
            gpus[slot * num_gpus : (slot + 1) * num_gpus],
        )
        for slot in range(num_slots)
    ]


@contextlib.contextmanager
def _exit_on_signals() -> Iterator[None]:
    """In this context SIGTERM and SIGHUP raise SystemExit, so that `finally` blocks run as after Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield
        return

    def exit_process(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    handlers = {number: signal.signal(number, exit_process) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@_exit_on_signals()
def run_all(jobs: Mapping[str, Job], out: Path, gpus_per_run: int = 1) -> dict[str, float]:
    """Run all unfinished jobs, and return the seconds of every job. Raises PecobookError when a job fails."""
    free_slots = gpu_slots(gpus_per_run)
    logs = out / "logs"
    logs.mkdir(exist_ok=True)
    waiting = {name: job for name, job in jobs.items() if not job.finished}
    running: dict[str, _Running] = {}
    progress = _Progress(jobs)
    try:
        while waiting or running:
            for name in [name for name, run in running.items() if run.process.poll() is not None]:
                run = running.pop(name)
                run.finish(name, logs)
                free_slots.append(run.slot)
            for name, job in list(waiting.items()):
                ready = all(jobs[need].finished for need in job.needs)
                if ready and free_slots:
                    running[name] = _Running(name, waiting.pop(name), out, free_slots.pop(0))
            progress.show()
            time.sleep(0.2)
    finally:
        for run in running.values():
            run.process.terminate()
        for run in running.values():
            run.process.wait()
        progress.close()
    return {name: job_seconds(job) for name, job in jobs.items()}


class _Running:
    """A running process of a job."""

    def __init__(self, name: str, job: Job, out: Path, slot: GpuSlot) -> None:
        self.slot = slot
        (out / "settings").mkdir(exist_ok=True)
        settings_file = out / "settings" / f"{name}.json"
        write_json(settings_file, to_dict(job.config))
        command = [sys.executable, "-m", "pecobook", job.command, "--config", str(settings_file)]
        if job.command == "tokenize":
            command += ["--resume", "auto"]
        elif job.command == "analyze":
            shutil.rmtree(job.out, ignore_errors=True)  # the files of an interrupted analysis
        elif (job.out / "config.json").exists():
            command.append("--resume")
        self.log: TextIO = (out / "logs" / f"{name}.log").open("a")
        environment = {**environment_without_launcher(), **child_environment(), **slot.environment}
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, env=environment)
        if hasattr(os, "sched_setaffinity"):  # threads and data-loading processes inherit the cores
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(self.process.pid, slot.cores)

    def finish(self, name: str, logs: Path) -> None:
        """Close the log. Raises PecobookError when the run failed."""
        self.log.close()
        if self.process.returncode:
            log = logs / f"{name}.log"
            last_lines = [line for line in log.read_text().splitlines() if line.strip()][-3:]
            raise PecobookError(f"The run '{name}' failed; the whole output is in {log}:\n" + "\n".join(last_lines))


class _Progress:
    """One line on all jobs: which jobs run, how much of each is done, how much time is left."""

    def __init__(self, jobs: Mapping[str, Job]) -> None:
        self.jobs, self.start, self.last_time = jobs, time.monotonic(), -100.0
        self.total = sum(job.work for job in jobs.values())
        self.done_at_start = self._done()
        self.last_state: tuple[float, list[str]] | None = None
        self.status: Any = None
        if sys.stderr.isatty():
            from rich.console import Console

            self.status = Console(stderr=True).status("starting")
            self.status.start()

    def show(self) -> None:
        """Show the progress; without a terminal print a line at most every ten seconds."""
        now = time.monotonic()
        if now - self.last_time < (0.5 if self.status is not None else 10):
            return
        self.last_time = now
        done = self._done()
        fractions = {name: job.fraction_done for name, job in self.jobs.items()}
        running = [f"{name} {100 * fraction:.0f}%" for name, fraction in fractions.items() if 0 < fraction < 1]
        speed = (done - self.done_at_start) / max(now - self.start, 1e-9)
        left = f", {compact_duration((self.total - done) / speed)} left" if done > self.done_at_start else ""
        line = f"{100 * done / self.total:3.0f}%{left}: " + ("; ".join(running) or "starting")
        if self.status is not None:
            from rich.text import Text

            self.status.update(Text(line))
        elif (done, running) != self.last_state:  # without this, the log of a long run would repeat equal lines
            show(line)
        self.last_state = (done, running)

    def close(self) -> None:
        """Stop the display."""
        if self.status is not None:
            self.status.stop()

    def _done(self) -> float:
        return sum(job.work * job.fraction_done for job in self.jobs.values())


def _last_step(run: Path) -> int:
    """Return the last logged step of a run; 0 when nothing has been logged."""
    try:
        lines = metric_lines(run / "metrics.jsonl")
    except OSError:
        return 0
    return int(lines[-1][1]["step"]) if lines else 0


def bank_is_complete(folder: Path) -> bool:
    """Whether every file of a token bank is written."""
    try:
        return not any(missing_shards(folder, bank_layouts(read_bank_config(folder))))
    except DataError:
        return False


def read_analysis(folder: Path) -> dict[str, Any]:
    """Return the content of an analysis.json of one tokenizer or more. Raises RunFolderError where it is damaged."""
    schema = {"seconds": NUMBER, "tokenizers": list_of(OBJECT)}
    return read_json(folder / "analysis.json", schema, remedy="Delete that folder, and start again.")


def job_seconds(job: Job) -> float:
    """Return the seconds that a finished job took, from its start to its end by the times of its files.

    For a resumed job it is the time of the logged steps, so that the time between interruption and resumption does not
    count.
    """
    if job.command == "analyze":
        return float(read_analysis(job.out)["seconds"])
    if not hasattr(job.config, "max_steps"):  # a token bank or a probe, whose time is not recorded
        return 0.0
    start, last_start, end = (
        (job.out / name).stat().st_mtime for name in ("config.json", "environment.json", "export/config.json")
    )
    return _logged_seconds(job.out) if last_start - start > 60 else max(end - start, 0.0)


def _logged_seconds(run: Path) -> float:
    batch_size = read_json(run / "config.json", {"batch_size": WHOLE})["batch_size"]
    seconds, last_step = 0.0, 0
    for _, line in metric_lines(run / "metrics.jsonl"):
        if line.get("images_per_second"):
            seconds += (line["step"] - last_step) * batch_size / line["images_per_second"]
            last_step = line["step"]
    return seconds
