"""Run pecobook commands as parallel processes in the order of their dependencies; resume interrupted ones.

Finished jobs are not run again. Jobs that do not depend on each other share the machine: one job per GPU, or, on CPUs,
one job per few cores, since several short trainings on one core each are much faster than one after another on all
cores. Processes on several machines may run the jobs of one folder at once: each job is locked while it runs. A job
that fails does not end the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from pecobook import recipes
from pecobook.data.tokens import bank_layouts, missing_shards, read_bank_config, shard_files
from pecobook.engine.log import compact_duration
from pecobook.engine.world import environment_without_launcher
from pecobook.errors import DataError, PecobookError, listed
from pecobook.recipes import RECIPES
from pecobook.settings.values import flag_words
from pecobook.utils.folder_lock import FolderBusyError, FolderLock
from pecobook.utils.json_files import NUMBER, OBJECT, WHOLE, Kind, list_of, read_json, read_metrics
from pecobook.utils.parent import child_environment
from pecobook.utils.printer import show

_LAST_FILE = {"analyze": "report.html", "predict": "robustness.json"}
"""The file that a command writes last, if it differs from a training's; a token bank ends with its last shard."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a command, and the jobs that must be finished before it starts."""

    command: str
    """A training command, whose length is given in steps, or tokenize, probe, analyze or predict."""
    config: Any
    """Settings of the command; `out` is the folder of the run."""
    needs: tuple[str, ...] = ()
    """Names of the jobs that must be finished first."""
    accept_data_change: bool = False
    """Whether a training or a token bank that began with other data continues; without it, the job is refused."""
    work: float = 1.0
    """Duration relative to the other jobs; only the estimate of the remaining time uses it."""

    @property
    def out(self) -> Path:
        """The folder that the job writes."""
        return Path(self.config.out)

    @property
    def finished(self) -> bool:
        """Whether everything that the command writes exists."""
        if self.command == "tokenize":
            return self.fraction_done == 1.0
        if self.command == "probe":
            return self.out.exists()
        return (self.out / _LAST_FILE.get(self.command, "export/config.json")).exists()

    @property
    def trains(self) -> bool:
        """Whether the job is a training, whose length is given in steps."""
        return self.command in RECIPES

    @property
    def fraction_done(self) -> float:
        """The part of the job that is done, in [0, 1]."""
        if self.command == "tokenize":
            return _written_part(self.out)
        if self.finished:
            return 1.0
        return _last_step(self.out) / int(self.config.max_steps) if self.trains else 0.0

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """The command line after `pecobook`; the same words start the job, and continue or repeat it."""
        if self.command == "predict":  # an interrupted one leaves an empty folder
            return (self.command, *flag_words(self.config, type(self.config)(), always=("run", "images", "out")))
        if self.command not in (*RECIPES, "tokenize"):
            words = flag_words(self.config, type(self.config)(), always=("data", "out"))
            return (self.command, *words, *(("--overwrite",) if hasattr(self.config, "overwrite") else ()))
        load = recipes.tokenize if self.command == "tokenize" else functools.partial(recipes.recipe, self.command)
        names = RECIPES["pretrain" if self.command == "tokenize" else self.command]
        bases = {name: load(name) for name in names}
        # The recipe from which the fewest settings differ, so that the line is short.
        flags = {
            name: flag_words(self.config, base, always=("data", "out"), never=("resume",))
            for name, base in bases.items()
            if _learns_from_clips(base) == _learns_from_clips(self.config)
        }
        recipe = min(flags, key=lambda name: len(flags[name]))
        accepts = self.accept_data_change and (self.out / "config.json").exists()
        accepting = ("--accept-data-change",) if accepts else ()
        return (self.command, recipe, *flags[recipe], "--resume", "auto", *accepting)


def _learns_from_clips(config: Any) -> bool:
    return hasattr(config, "clip") and config.clip.frames > 0


def _written_part(bank: Path) -> float:
    """Return the written part of a token bank, in [0, 1]."""
    try:
        layouts = bank_layouts(read_bank_config(bank))
    except DataError:
        return 0.0
    return 1 - sum(1 for _ in missing_shards(bank, layouts)) / sum(1 for _ in shard_files(bank, layouts))


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


@dataclasses.dataclass
class Outcome:
    """The fate of the jobs that this process did not finish."""

    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    """The last lines that a failed job printed, by its name."""
    not_run: dict[str, str] = dataclasses.field(default_factory=dict)
    """The failed job that a job needs, by the name of the job that was not run."""

    def check(self, out: Path) -> None:
        """Raise PecobookError if a job failed."""
        if not self.failed:
            return
        lines = []
        for name, last_lines in self.failed.items():
            lines.append(f"The run '{name}' failed; the whole output is in {out / 'logs' / name}.log:\n{last_lines}")
        text = listed(lines)
        if self.not_run:
            text += f"\nNot run, since they need it: {', '.join(self.not_run)}."
        raise PecobookError(f"{text}\nThe same command again runs only what is missing.")


_PERIOD = 0.5
"""Seconds between checks of the folders of up to 50 jobs; more jobs are checked less often."""


@_exit_on_signals()
def run_all(jobs: Mapping[str, Job], out: Path, gpus_per_run: int = 1) -> Outcome:
    """Run all unfinished jobs that no other process runs, and wait for those that another process runs.

    A failing job does not end the others; those that need it are not run.
    """
    (out / "logs").mkdir(exist_ok=True)
    free_slots = gpu_slots(gpus_per_run)
    waiting, running, outcome = dict(jobs), dict[str, _Running](), Outcome()
    progress = Progress(jobs)
    finished: set[str] = set()
    try:
        while waiting or running:
            for name in [name for name, run in running.items() if run.process.poll() is not None]:
                run = running.pop(name)
                free_slots.append(run.slot)
                if error := run.finish():
                    outcome.failed[name] = error
                    show(f"The run '{name}' failed: {error.splitlines()[-1]}\nThe others go on; {run.log_file}")
            for name, job in list(waiting.items()):
                if job.finished:
                    del waiting[name]
                    finished.add(name)
                elif blocked := next((need for need in job.needs if need in outcome.failed | outcome.not_run), ""):
                    del waiting[name]
                    outcome.not_run[name] = outcome.not_run.get(blocked, blocked)
                elif (
                    free_slots
                    and all(need in finished or jobs[need].finished for need in job.needs)
                    and (lock := _try_lock(job, out / "locks" / name)) is not None
                ):
                    del waiting[name]
                    running[name] = _Running(name, job.words, out, free_slots.pop(0), lock)
            progress.show(running)
            time.sleep(_PERIOD * max(1.0, len(jobs) / 50))
    finally:
        for run in running.values():
            run.process.terminate()
        for run in running.values():
            run.process.wait()
            run.lock.release()
        progress.close()
    for fates in (outcome.failed, outcome.not_run):  # another machine may have finished a job that failed here
        for name in [name for name in fates if jobs[name].finished]:
            del fates[name]
    return outcome


def seconds_of(jobs: Mapping[str, Job]) -> dict[str, float]:
    """Return the seconds of every finished job except token banks and probes, which do not record theirs."""
    untimed = ("tokenize", "probe")
    return {name: job_seconds(job) for name, job in jobs.items() if job.command not in untimed and job.finished}


def _try_lock(job: Job, folder: Path) -> FolderLock | None:
    """Return the lock of a job that no process runs; None for a job that another process runs or has finished.

    A process that was started by hand, or whose starter was killed a moment ago, locks only the job's own folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FolderLock(folder)
    except FolderBusyError:
        return None
    try:
        if job.out.is_dir():
            FolderLock(job.out).release()
    except FolderBusyError:
        lock.release()
        return None
    except BaseException:
        lock.release()
        raise
    if job.finished:
        lock.release()
        return None
    return lock


class _Running:
    """A running process of a job."""

    def __init__(self, name: str, words: Sequence[str], out: Path, slot: GpuSlot, lock: FolderLock) -> None:
        self.slot, self.lock = slot, lock
        self.log_file = out / "logs" / f"{name}.log"
        self.log: TextIO = self.log_file.open("a")
        command = [sys.executable, "-m", "pecobook", *words]
        environment = {**environment_without_launcher(), **child_environment(), **slot.environment}
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, env=environment)
        if hasattr(os, "sched_setaffinity"):  # threads and data-loading processes inherit the cores
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(self.process.pid, slot.cores)

    def finish(self) -> str:
        """Close the log and release the job; return the last lines of a failed run, otherwise an empty string."""
        self.log.close()
        self.lock.release()
        if not self.process.returncode:
            return ""
        lines = [line for line in self.log_file.read_text(errors="replace").splitlines() if line.strip()]
        if (code := self.process.returncode) < 0:
            why = ", as the system does where memory is short" if code == -signal.SIGKILL else ""
            lines.append(f"It was ended by {signal.Signals(-code).name}{why}.")
        return "\n".join(lines[-3:]) or f"exit code {code}"


class Progress:
    """One line on all jobs: which jobs run, how much of each is done, how much time is left."""

    def __init__(self, jobs: Mapping[str, Job]) -> None:
        self.jobs, self.start, self.last_time = jobs, time.monotonic(), -100.0
        self.total = sum(job.work for job in jobs.values()) or 1.0  # only probes and token banks: no estimate
        self.done_at_start = self._done(self._fractions())
        self.last_state: tuple[int, list[str]] | None = None
        self.status: Any = None
        if sys.stderr.isatty():
            from rich.console import Console

            self.status = Console(stderr=True).status("starting")
            self.status.start()

    def show(self, started: Collection[str] = ()) -> None:
        """Show the progress, with the jobs that this process runs; off a terminal a line at most every ten seconds."""
        now = time.monotonic()
        if now - self.last_time < (0.5 if self.status is not None else 10):
            return
        self.last_time = now
        fractions = self._fractions()
        done, num_finished = self._done(fractions), sum(fraction == 1 for fraction in fractions.values())
        shown = {name: fraction for name, fraction in fractions.items() if name in started or 0 < fraction < 1}
        running = [f"{name} {100 * fraction:.0f}%" for name, fraction in shown.items()]
        speed = (done - self.done_at_start) / max(now - self.start, 1e-9)
        left = f", {compact_duration((self.total - done) / speed)} left" if done > self.done_at_start else ""
        share = f"{100 * done / self.total:3.0f}%, {num_finished} of {len(self.jobs)} runs finished{left}"
        line = f"{share}: " + ("; ".join(running) or "starting")
        if self.status is not None:
            from rich.text import Text

            self.status.update(Text(line))
        elif (num_finished, running) != self.last_state:  # the log of a long run does not repeat equal lines
            show(line)
        self.last_state = (num_finished, running)

    def close(self) -> None:
        """Stop the display."""
        if self.status is not None:
            self.status.stop()

    def _fractions(self) -> dict[str, float]:
        return {name: job.fraction_done for name, job in self.jobs.items()}

    def _done(self, fractions: Mapping[str, float]) -> float:
        return sum(self.jobs[name].work * fraction for name, fraction in fractions.items())


def _last_step(run: Path) -> int:
    """Return the last logged step of a run; 0 if nothing has been logged."""
    try:
        records = read_metrics(run / "metrics.jsonl")
    except OSError:
        return 0
    return int(records[-1]["step"]) if records else 0


def read_analysis(folder: Path) -> dict[str, Any]:
    """Return the content of an analysis.json of one or more tokenizers. Raises RunFolderError if it is damaged."""
    some = Kind("a list of one object or more", lambda value: bool(value) and list_of(OBJECT).holds(value))
    schema = {"seconds": NUMBER, "tokenizers": some}
    return read_json(folder / "analysis.json", schema, remedy="Delete that folder, and start again.")


def job_seconds(job: Job) -> float:
    """Return the seconds that a finished job took, from start to end according to its files' times.

    For a resumed job it is the time of the logged steps, so that the time between interruption and resumption does not
    count.
    """
    if job.command == "analyze":
        return float(read_analysis(job.out)["seconds"])
    if job.command == "predict":
        return float(read_json(job.out / _LAST_FILE["predict"], {"seconds": NUMBER})["seconds"])
    start, last_start, end = (
        (job.out / name).stat().st_mtime for name in ("config.json", "environment.json", "export/config.json")
    )
    return _logged_seconds(job.out) if last_start - start > 60 else max(end - start, 0.0)


def _logged_seconds(run: Path) -> float:
    batch_size = read_json(run / "config.json", {"batch_size": WHOLE})["batch_size"]
    seconds, last_step = 0.0, 0
    for record in read_metrics(run / "metrics.jsonl"):
        if record.get("images_per_second"):
            seconds += (record["step"] - last_step) * batch_size / record["images_per_second"]
            last_step = record["step"]
    return seconds
