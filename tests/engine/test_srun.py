"""Two tasks of srun train one run: two processes with the variables of Slurm, none of which ends with the other.

tests/test_slurm.py runs the same under a real Slurm where there is one.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pecobook import api
from pecobook.engine import checkpoint
from tests import forked
from tests.distributed import TwoProcesses
from tests.runs import SMALL, export_bytes, logged, losses, small_flags

_STEPS = {"max_steps": "12", "save_every": 4, "log_every": 1}
_LIMIT = 240


class Tasks:
    """The two tasks of one step."""

    def __init__(self, folder: Path, images: Path, out: Path, *more: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        flags = ["--data", str(images), "--out", str(out), *small_flags("contrast", **_STEPS), *more]
        variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            **{"SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"},
            **{"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_NODEID": "0"},
            **{"SLURM_GTIDS": "0,1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        }
        self.logs = [folder / f"task-{rank}.txt" for rank in range(2)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
            self.processes.append(forked.start(["contrast", "tiny", *flags], log, {**variables, **own}))

    def wait(self) -> list[int | None]:
        for process in self.processes:
            process.join(_LIMIT)
        return [process.exitcode for process in self.processes]

    def said(self) -> list[str]:
        return [log.read_text() for log in self.logs]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture
def started() -> Iterator[list[Tasks]]:
    tasks: list[Tasks] = []
    yield tasks
    for task in tasks:
        task.kill()


def handles(pid: int, number: signal.Signals) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (number - 1) & 1)


def wait_until(condition: object, tasks: Tasks) -> None:
    stop = time.monotonic() + _LIMIT
    while not condition():  # type: ignore[operator]
        assert all(process.exitcode is None for process in tasks.processes), tasks.said()
        assert time.monotonic() < stop
        time.sleep(0.01)


def train_in_pool(rank: int, world_size: int, images: str, out: str) -> None:
    api.contrast("tiny", **{**SMALL["contrast"], **_STEPS, "data": images, "out": out})


def test_sigusr1_saves_and_resume_auto_ends_as_an_uninterrupted_run(
    images: Path, tmp_path: Path, two_processes: TwoProcesses, started: list[Tasks]
) -> None:
    two_processes.run(train_in_pool, str(images), str(tmp_path / "straight"))
    out = tmp_path / "run"
    started.append(tasks := Tasks(tmp_path, images, out, "--resume", "auto"))
    wait_until(lambda: (out / "metrics.jsonl").exists() and len(logged(out)) >= 2, tasks)
    for process in tasks.processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGUSR1)
    assert tasks.wait() == [130, 130], tasks.said()
    assert "the checkpoint is written. Continue with --resume." in tasks.said()[0]
    assert tasks.said()[1] == ""
    (step,) = checkpoint.steps(out / "checkpoints")[-1:]
    assert 2 <= step < 12
    started.append(tasks := Tasks(tmp_path, images, out, "--resume", "auto"))
    assert tasks.wait() == [0, 0], tasks.said()
    assert [line["step"] for line in logged(out)] == list(range(1, 13))
    assert losses(out) == losses(tmp_path / "straight")
    assert export_bytes(out) == export_bytes(tmp_path / "straight")


def test_a_refusal_of_the_first_task_ends_all_with_one_message(
    images: Path, tmp_path: Path, started: list[Tasks]
) -> None:
    out = tmp_path / "full"
    out.mkdir()
    (out / "thesis.tex").touch()
    started.append(tasks := Tasks(tmp_path, images, out))
    assert tasks.wait() == [2, 2], tasks.said()
    first, second = tasks.said()
    assert first.startswith(f"pecobook: --out '{out}' is not empty")
    assert len(first.splitlines()) == 1
    assert second == ""
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_flag_that_disagrees_is_refused_before_the_folder_is_made(
    images: Path, tmp_path: Path, started: list[Tasks]
) -> None:
    started.append(tasks := Tasks(tmp_path, images, tmp_path / "run", "--devices", "4"))
    assert tasks.wait() == [2, 2], tasks.said()
    expected = "pecobook: --devices 4: srun has started 2 processes on each machine. Leave --devices out.\n"
    assert tasks.said() == [expected, ""]
    assert not (tmp_path / "run").exists()


def test_sigterm_to_one_task_at_its_start_ends_both(images: Path, tmp_path: Path, started: list[Tasks]) -> None:
    started.append(tasks := Tasks(tmp_path, images, tmp_path / "run"))
    first = tasks.processes[0]
    wait_until(lambda: first.pid is not None and handles(first.pid, signal.SIGTERM), tasks)
    first.terminate()
    assert tasks.wait() == [130, 130], tasks.said()
    assert tasks.said() == ["Stopped before the first step.\n", ""]
    assert not (tmp_path / "run").exists()
