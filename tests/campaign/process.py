"""pecobook as a process: forked from this one, which has imported everything, so that a start costs no seconds."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pecobook import cli
from pecobook.errors import PecobookError

IMPORTED = (
    *(f"pecobook.commands.{name}" for name in ("analyze", "check", "demo", "predict", "reproduce", "tokenize")),
    *(
        f"pecobook.stages.{name}"
        for name in ("classify", "codebook", "detect", "moco", "pretrain", "segment", "training")
    ),
    *("pecobook.engine.loop", "pecobook.engine.run_folder", "pecobook.engine.preamble", "pecobook.cli"),
    *("pecobook.data.folders", "pecobook.analysis.detections", "pecobook.analysis.confusion"),
    *("lightning_fabric", "torch.utils.tensorboard.writer", "timm", "datasets", "pycocotools.coco", "PIL.Image"),
)


def warm_up() -> None:
    """Import what commands import. Raises RuntimeError when this process has threads, which no fork would have."""
    import torch

    for name in IMPORTED:
        importlib.import_module(name)
    torch.set_num_threads(1)
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    if len([name for name in threads if name != "jemalloc_bg_thd"]) > 1:  # pyarrow's, which survives a fork
        raise RuntimeError("the campaign forks, and therefore must have one thread: set OMP_NUM_THREADS=1.")


class Process:
    """A command of pecobook in a session of its own.

    Args:
        words: the command line after `pecobook`.
        log: file of standard output and standard error.
        prepare: called in the process before the command.
        environment: further environment variables.
    """

    def __init__(
        self,
        words: Sequence[str],
        log: Path,
        prepare: Callable[[], None] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.words, self.log, self.code = list(words), log, None
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _become(self.words, log, parent, prepare, environment or {})

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while the process runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    code: int | None

    def wait(self, seconds: float = 900.0) -> int:
        """Return the exit code. Raises TimeoutError, after the process was killed."""
        stop = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > stop:
                self.end()
                raise TimeoutError(f"no end after {seconds:.0f} s: pecobook {' '.join(self.words)[:200]}")
            time.sleep(0.003)
        assert self.code is not None
        return self.code

    def send(self, number: int) -> None:
        """Send a signal, if the process runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def left(self) -> list[int]:
        """Return the processes of the session that are still there, without the first."""
        return [pid for pid in _session(self.pid) if pid != self.pid]

    def end(self) -> None:
        """Kill what is left of the session."""
        for pid in {*_session(self.pid), *([self.pid] if self.code is None else [])}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.003)

    @property
    def text(self) -> str:
        """What the process has written to the screen."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""  # killed before it was opened


def run(words: Sequence[str], log: Path, seconds: float = 900.0, **options: Any) -> Process:
    """Run a command to its end, and end what it left."""
    process = Process(words, log, **options)
    process.wait(seconds)
    process.end()
    return process


def _session(pid: int) -> list[int]:
    """Return the living processes of a session; a zombie counts as dead."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == pid and state != "Z":
                    pids.append(int(entry.name))
    return pids


def _become(
    words: list[str], log: Path, parent: int, prepare: Callable[[], None] | None, environment: Mapping[str, str]
) -> NoReturn:
    """Turn this fork into a process of pecobook, and exit with its code."""
    code = 70
    try:
        os.setsid()
        die_with(parent)
        redirect(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC))
        os.environ.update(environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["pecobook", *words]
        _fork_jobs()
        if prepare is not None:
            prepare()
        code = exit_code(words)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def redirect(file: int) -> None:
    """Write standard output and standard error to a file, also where pytest has replaced them."""
    null = os.open(os.devnull, os.O_RDONLY)
    for number, target in ((0, null), (1, file), (2, file)):
        os.dup2(target, number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def die_with(parent: int) -> None:
    """Let the kernel kill this process when the campaign ends, however it ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(70)


def exit_code(words: list[str], program: Callable[[list[str]], object] = cli.main) -> int:
    """Run a command as `python -m pecobook` does, with the functions that Python calls at exit."""
    try:
        program(words)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except (Exception, KeyboardInterrupt, PecobookError):
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    return code


class ForkedJob:
    """Stands for subprocess.Popen in `commands.jobs`: the trainings of demo and reproduce are forks too."""

    def __init__(
        self,
        command: list[str],
        stdout: Any,
        stderr: int,
        env: Mapping[str, str],
        preexec_fn: Callable[[], None] | None = None,
        **_: Any,
    ) -> None:
        assert stderr == subprocess.STDOUT
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                    signal.signal(number, signal.SIG_DFL)
                redirect(stdout.fileno())
                os.environ.update(env)
                if preexec_fn is not None:
                    preexec_fn()
                words = command[command.index("pecobook") + 1 :]
                sys.argv = ["pecobook", *words]
                code = exit_code(words)
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        del timeout
        while self.poll() is None:
            time.sleep(0.003)
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def _fork_jobs() -> None:
    from pecobook.commands import jobs

    class Module:
        """The module subprocess, with another Popen."""

        Popen = ForkedJob

        def __getattr__(self, name: str) -> Any:
            return getattr(subprocess, name)

    jobs.__dict__["subprocess"] = Module()
