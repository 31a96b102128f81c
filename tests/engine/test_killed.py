"""A data-loading process that is killed during a run: the step is saved, and one sentence says what to do."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pecobook.data.loading import WorkerError
from pecobook.data.stream import Stream
from pecobook.engine import checkpoint
from tests.distributed import TwoProcesses
from tests.runs import export_bytes, logged, losses, train

_MORE: dict[str, Any] = {"workers": 1, "max_steps": "10", "save_every": 100}


class _KilledOnce:
    """`Stream.__getitem__` that kills the data-loading process which first reads the position `at`."""

    def __init__(self, flag: Path, at: int) -> None:
        self.flag, self.at, self.parent, self.original = flag, at, os.getpid(), Stream.__getitem__

    def __call__(self, stream: Stream, position: int) -> dict[str, Any]:
        if position == self.at and os.getpid() != self.parent and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.original(stream, position)


def kill_at(monkeypatch: pytest.MonkeyPatch, flag: Path, at: int) -> None:
    once = _KilledOnce(flag, at)
    monkeypatch.setattr(Stream, "__getitem__", lambda stream, position: once(stream, position))


@pytest.mark.parametrize("more", [{}, {"micro_batch_size": 4}])
def test_train__a_killed_worker_costs_nothing(
    more: dict[str, Any], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train("codebook", images, tmp_path / "straight", **_MORE, **more)
    with monkeypatch.context() as patch:
        kill_at(patch, tmp_path / "flag", 8 * 5 + 6)  # in the second half of the sixth step
        with pytest.raises(WorkerError) as caught:
            train("codebook", images, tmp_path / "run", **_MORE, **more)
    first, second = str(caught.value).splitlines()
    assert first == (
        "A data-loading process was killed (SIGKILL), most likely because memory ran out. "
        "Take fewer --workers (now 1) or more memory."
    )
    (step,) = checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert step <= 6  # the process had read ahead, and took with it what it had not handed over
    assert second == f"Stopped at step {step}; the checkpoint is written. Continue with --resume."
    run = train("codebook", images, tmp_path / "run", **_MORE, **more, resume=True)
    assert losses(run) == losses(straight)
    assert export_bytes(run) == export_bytes(straight)


def test_train__a_worker_killed_in_the_last_step_ends_no_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(monkeypatch, tmp_path / "flag", 0)
    run = train("codebook", images, tmp_path / "run", **{**_MORE, "max_steps": "1"})
    assert (tmp_path / "flag").exists()
    assert [line["step"] for line in logged(run)] == [1]
    assert (run / "export" / "model.safetensors").is_file()
    assert "A data-loading process was killed" in (run / "train.log").read_text()


def killed_in_pool(rank: int, _world_size: int, images: str, out: str) -> str:
    """Train as one of two processes, of which the second loses its data-loading process; return the error."""
    multiprocessing.set_start_method("fork", force=True)  # so that its data-loading process has the change below too
    original = Stream.__getitem__
    if rank == 1:
        once = _KilledOnce(Path(out).with_name("flag"), 8 * 5 + 6)  # rank 1 reads the second half of each batch
        Stream.__getitem__ = lambda stream, position: once(stream, position)  # type: ignore[method-assign]
    try:
        train("codebook", images, Path(out), **_MORE)
    except WorkerError as error:
        return f"{error.on_all_ranks} {error}"
    finally:
        Stream.__getitem__ = original  # type: ignore[method-assign]
    return ""


@pytest.mark.slow
def test_train__both_ranks_stop_and_save_when_one_loses_a_worker(
    images: Path, tmp_path: Path, two_processes: TwoProcesses
) -> None:
    first, second = two_processes.run(killed_in_pool, str(images), str(tmp_path / "run"))
    assert first == second
    assert first.startswith("True A data-loading process was killed (SIGKILL)")
    (step,) = checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert f"Stopped at step {step};" in first
    run = train("codebook", images, tmp_path / "run", **_MORE, resume=True)
    assert [line["step"] for line in logged(run)] == list(range(1, 11))
