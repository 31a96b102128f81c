"""An interrupted run ends with the same bytes as an uninterrupted run: every stage, every way of being stopped."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pecobook import api
from pecobook.engine import checkpoint, run_folder
from pecobook.engine.stage import Stage
from pecobook.errors import NonFiniteLossError, RunFolderError
from pecobook.models.quantizer import VectorQuantizer
from pecobook.settings.training import TrainConfig
from pecobook.stages.codebook import CodebookStage
from pecobook.stages.moco import MocoStage
from pecobook.utils.folder_lock import FolderLock
from tests import forked
from tests.distributed import TwoProcesses
from tests.runs import SMALL, export_bytes, logged, losses, train

COMMANDS = tuple(SMALL)


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send the run a signal to stop once `step` steps are done, as `kill` would."""
    original_warning = Stage.warning

    def warning(self: Stage[TrainConfig], metrics: dict[str, float], now: int) -> str | None:
        if now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original_warning(self, metrics, now)

    for kind in (Stage, CodebookStage, MocoStage):
        monkeypatch.setattr(kind, "warning", warning)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("command", COMMANDS)
def test_train__eight_steps_equal_four_and_four(
    command: str, precision: str, images: Path, needs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {**needs, "precision": precision, "sample_every": 4}
    straight = train(command, images, tmp_path / "straight", **more)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)  # read by the next step, the fourth
        with pytest.raises(SystemExit) as caught:
            train(command, images, tmp_path / "parts", **more)
    assert caught.value.code == 130
    assert checkpoint.steps(tmp_path / "parts" / "checkpoints") == [4]
    assert not (tmp_path / "parts" / "export").exists()
    parts = train(command, images, tmp_path / "parts", **more, resume=True)
    resumed_files, expected_files = export_bytes(parts), export_bytes(straight)
    assert resumed_files.keys() == expected_files.keys() >= {"model.safetensors", "config.json", "README.md"}
    assert all(resumed_files[name] == expected_files[name] for name in resumed_files)
    assert losses(parts) == losses(straight)
    assert [line["step"] for line in logged(parts)] == list(range(1, 9))
    a, b = (
        torch.load(run / "checkpoints" / "step-00000008" / "state.pt", weights_only=True) for run in (parts, straight)
    )
    assert flatten(a) == flatten(b)  # also the state outside the export: optimizer, averages, momentum encoder


def test_train__lars_resumes_exactly(images: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"optim.name": "lars", "optim.lr": 0.3, "max_steps": "4", "save_every": 2}
    straight = train("contrast", images, tmp_path / "straight", **more)
    parts = train("contrast", images, tmp_path / "parts", **more)
    shutil.rmtree(parts / "checkpoints" / "step-00000004")
    shutil.rmtree(parts / "export")
    train("contrast", images, parts, **more, resume=True)
    assert export_bytes(parts) == export_bytes(straight)
    assert losses(parts) == losses(straight)


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: leaf for part, inner in value.items() for key, leaf in flatten(inner, f"{name}/{part}").items()}
    if isinstance(value, list | tuple):
        return flatten(dict(enumerate(value)), name)
    return {name: value.cpu().flatten().tolist() if isinstance(value, torch.Tensor) else value}


def test_train__resumed_on_the_last_step_finishes_what_a_kill_left(images: Path, tmp_path: Path) -> None:
    run = train("codebook", images, tmp_path / "run", max_steps="2")
    before = export_bytes(run)
    for file in (run / "export").iterdir():
        file.unlink()
    old = run / "checkpoints" / "step-00000000"  # of a kill before the oldest checkpoint was deleted
    shutil.copytree(run / "checkpoints" / "step-00000002", old)
    shutil.copytree(old, run / "checkpoints" / "step-00000001", dirs_exist_ok=True)
    changes = (run / "config.diff").read_bytes()
    (run / "config.diff").rename(run / ".config.diff.tmp")  # of a kill as it was written
    train("codebook", images, tmp_path / "run", max_steps="2", resume=True)
    assert export_bytes(run) == before
    assert (run / "config.diff").read_bytes() == changes
    assert not (run / ".config.diff.tmp").exists()
    assert checkpoint.steps(run / "checkpoints") == [1, 2]


@pytest.mark.parametrize("command", ["finetune", "segment", "detect"])
def test_overwrite__deletes_every_file_of_a_finished_run(
    command: str, images: Path, needs: dict[str, str], tmp_path: Path
) -> None:
    more: dict[str, Any] = {**needs, "max_steps": "1", "loggers": ("tensorboard",)}
    run = train(command, images, tmp_path / "run", **more)
    assert (run / "samples").is_dir()
    run_folder.prepare(TrainConfig(out=str(run), overwrite=True), command).release()
    left = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert left == {"config.json", "environment.json"}


def test_train__with_auto_precision_can_be_resumed(images: Path, tmp_path: Path) -> None:
    run = train("codebook", images, tmp_path / "run", max_steps="2", precision="auto")
    assert re.search(r'"precision": "(fp32|bf16)"', (run / "config.json").read_text())
    train("codebook", images, tmp_path / "run", max_steps="2", precision="auto", resume=True)


def test_train__frees_the_folder_after_an_error(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        original_loss = F.mse_loss
        patch.setattr(F, "mse_loss", lambda *args, **kwargs: original_loss(*args, **kwargs) * float("nan"))
        with pytest.raises(NonFiniteLossError):
            train("codebook", images, tmp_path / "run", max_steps="2")
    train("codebook", images, tmp_path / "run", max_steps="1", overwrite=True)


# ------------------------------------------------------------------------------------------ runs as a user starts them

# A narrower `tiny` recipe, since these tests only need a run that can be stopped.
_SHAPE: dict[str, Any] = {
    "model.channels": (8, 16, 16, 32),
    "quantizer.num_codewords": 64,
    "quantizer.start_after": 3,
    "batch_size": 8,
}
_LENGTH: dict[str, Any] = {"max_steps": "30", "save_every": 5, "log_every": 1}
_FLAGS = [
    word
    for name, value in {**_SHAPE, **_LENGTH}.items()
    for word in (f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)]))
]


def command(images: Path, out: Path, *more: str) -> list[str]:
    return ["codebook", "tiny", "--data", str(images), "--out", str(out), *_FLAGS, *more]


def last_step(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def wait_for_step(has_ended: Callable[[], object], run: Path, step: int) -> None:
    stop = time.monotonic() + 200
    while last_step(run) < step:
        assert not has_ended()
        assert time.monotonic() < stop
        time.sleep(0.005)
    time.sleep(random.random() * 0.05)  # anywhere within a step


@pytest.fixture(scope="module")
def straight_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `command` without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    forked.run(command(images, folder / "run"), folder / "log")
    return folder / "run"


def test_command__killed_at_any_moment_and_resumed_has_the_same_export(
    images: Path, straight_run: Path, tmp_path: Path
) -> None:
    step = random.randrange(6, 25)
    out, log = tmp_path / "run", tmp_path / "log"
    process = forked.start(command(images, out), log)
    wait_for_step(lambda: process.exitcode is not None, out, step)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "export").exists()
    forked.run(command(images, out, "--resume"), log)
    assert export_bytes(out) == export_bytes(straight_run), f"killed about step {step}"
    assert [line["step"] for line in logged(out)] == list(range(1, 31))
    assert losses(out) == losses(straight_run)


def test_command__a_signal_to_the_whole_group_saves_also_with_data_workers(
    images: Path, straight_run: Path, tmp_path: Path
) -> None:
    """Ctrl-C in a terminal, torchrun and `timeout` signal every process of the group, the data workers too."""
    out, log = tmp_path / "run", tmp_path / "log"
    process = forked.start(command(images, out, "--workers", "2"), log)
    wait_for_step(lambda: process.exitcode is not None, out, 3)
    assert process.pid is not None
    os.killpg(process.pid, signal.SIGTERM)
    process.join(200)
    said = log.read_text()
    assert process.exitcode == 130, said
    assert "Continue with --resume" in said
    assert "Traceback" not in said
    (stopped,) = checkpoint.steps(out / "checkpoints")[-1:]
    assert 3 <= stopped < 30
    assert losses(out) == losses(straight_run)[:stopped]


def children(pid: int) -> list[int]:
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if int(parent) == pid:
                pids.append(int(entry.name))
    return pids


def wait_for_lock(run: Path) -> None:
    """Wait until a killed process has released its lock, which takes until its last thread ends."""
    stop = time.monotonic() + 30
    while True:
        try:
            return FolderLock(run).release()
        except RunFolderError:
            assert time.monotonic() < stop
            time.sleep(0.01)


def train_in_pool(rank: int, world_size: int, images: str, out: str, resume: bool) -> tuple[int, str]:
    """Train as one of two processes; return the number of updates of its codebook, and a hash of the final codebook."""
    updated: list[VectorQuantizer] = []
    original_update = VectorQuantizer.update

    def update(self: VectorQuantizer) -> None:
        original_update(self)
        updated.append(self)

    VectorQuantizer.update = update  # type: ignore[method-assign]
    try:
        api.codebook("tiny", data=images, out=out, **_SHAPE, **_LENGTH, resume=resume)
    finally:
        VectorQuantizer.update = original_update  # type: ignore[method-assign]
    return len(updated), hashlib.sha256(updated[-1].codebook.numpy().tobytes()).hexdigest()


def test_command__two_processes_keep_one_codebook_and_resume_after_a_kill(
    images: Path, tmp_path: Path, two_processes: TwoProcesses
) -> None:
    first, second = two_processes.run(train_in_pool, str(images), str(tmp_path / "straight"), False)
    assert first == second
    assert first[0] == 30
    out, step = tmp_path / "run", random.randrange(6, 25)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    with subprocess.Popen([*torchrun, "-m", "pecobook", *command(images, out)], stderr=subprocess.PIPE) as process:
        wait_for_step(process.poll, out, step)
        ranks = children(process.pid)
        for pid in [process.pid, *ranks]:
            os.kill(pid, signal.SIGKILL)
    assert len(ranks) == 2
    wait_for_lock(out)
    assert not (out / "export").exists()
    assert two_processes.run(train_in_pool, str(images), str(out), True)[0][1] == first[1]
    assert export_bytes(out) == export_bytes(tmp_path / "straight"), f"killed about step {step}"


def test_command__a_run_of_one_process_resumes_on_three(images: Path, tmp_path: Path) -> None:
    """Codewords die and are revived after the resume; all three processes must choose the same new codewords."""
    words = ["--batch-size", "12", "--max-steps", "24", "--save-every", "12", "--quantizer.revive-after", "4"]
    words += ["--precision", "fp32", "--optim.eps", "0.1"]  # a smaller epsilon would amplify rounding errors
    # In this shape no rounding error makes a vector choose the other of two near codewords within 24 steps.
    words += ["--model.group-size", "0", "--model.padding", "zeros", "--optim.lr", "1e-3", "--quantizer.decay", "0.95"]
    alone, run = tmp_path / "alone", tmp_path / "run"
    forked.run(command(images, alone, *words), tmp_path / "log")
    shutil.copytree(alone, run)
    shutil.rmtree(run / "checkpoints" / "step-00000024")
    shutil.rmtree(run / "export")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    three, resume = [tmp_path / str(rank) for rank in range(3)], command(images, run, *words, "--resume")
    worlds = [{**os.environ, **forked.torchrun_variables(rank, 3, port)} for rank in range(3)]
    processes = [forked.start(resume, log, world) for log, world in zip(three, worlds, strict=True)]
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0, 0], [log.read_text() for log in three]
    assert losses(run)[:12] == losses(alone)[:12]
    assert losses(run) == pytest.approx(losses(alone), rel=1e-3)
    revived = [line["revived"] for line in logged(run)]
    assert revived == [line["revived"] for line in logged(alone)]
    assert revived[-1] > revived[11]
