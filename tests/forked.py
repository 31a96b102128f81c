"""pecobook as a process of its own, forked from a process that has imported everything: a start costs no seconds.

Where torchrun starts the processes, and for the first run of the demo, tests start Python anew, as users do.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, TextIO

from pecobook import cli
from tests.campaign.process import IMPORTED, die_with, exit_code, redirect


@functools.cache
def context() -> ForkServerContext:
    """Return how to start processes from one that has imported pecobook, and begin that one."""
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(list(IMPORTED))
    before = os.environ.get("TORCH_CPP_LOG_LEVEL")
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as pecobook sets it for processes that a launcher has started
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("TORCH_CPP_LOG_LEVEL")
        if before is not None:
            os.environ["TORCH_CPP_LOG_LEVEL"] = before
    return chosen


def start(
    words: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
    program: Callable[[list[str]], object] = cli.main,
) -> ForkServerProcess:
    """Start `pecobook WORDS` in a session of its own.

    Args:
        words: the command line after `pecobook`.
        log: file to which standard output and standard error are appended.
        environment: all environment variables; those of this process by default.
        prepare: a function at the top level of its module, called in the process before the command.
        program: what is called with the words, for another program than pecobook.
    """
    variables = dict(os.environ if environment is None else environment)
    process = context().Process(target=_run, args=(list(words), log, variables, prepare, program))
    process.start()
    return process


def run(words: Sequence[str], log: Path, **options: Any) -> None:
    """Run `start(words, log, **options)` to its end; all it has written is in the error when it fails."""
    process = start(words, log, **options)
    process.join(600)
    assert process.exitcode == 0, log.read_text()


class Job:
    """Stands for subprocess.Popen in `commands.jobs`."""

    def __init__(self, command: list[str], stdout: TextIO, env: Mapping[str, str], **_: Any) -> None:
        assert command[:3] == [sys.executable, "-m", "pecobook"]
        self.process = start(command[3:], Path(stdout.name), env)
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)

    def wait(self) -> None:
        self.process.join()

    def terminate(self) -> None:
        self.process.terminate()


def torchrun_variables(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return the environment variables that torchrun sets for a process of one machine."""
    return {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
        **{"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "tests"},
    }


def _run(
    words: list[str],
    log: Path,
    environment: dict[str, str],
    prepare: Callable[[], None] | None,
    program: Callable[[list[str]], object],
) -> None:
    import torch

    os.setsid()
    die_with(os.getppid())
    redirect(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND))
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if prepare is not None:
        prepare()
    sys.argv = ["pecobook", *words]
    code = exit_code(words, program)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
