"""The command line: error messages for user errors, help, and the files of a run."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pecobook import cli
from pecobook.errors import ConfigError, NonFiniteLossError, PecobookError
from tests.distributed import TwoProcesses
from tests.runs import export_bytes, losses, small_flags, train


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: an empty folder and a filled folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PECOBOOK_TRACEBACK", raising=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").touch()
    return tmp_path


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def fail(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must end with code 2; return the error message without the leading `pecobook: `."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert "Traceback" not in err
    assert err.startswith("pecobook: ")
    return err.removeprefix("pecobook: ")


def test_main__finetune_refuses_data_without_labels(
    folder: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    typed = ["finetune", "tiny", "--data", str(images / "red"), "--out", "run", "--backbone", "timm:resnet10t"]
    message = fail([*typed, "--weights", "random"], capsys)
    assert "has no labels" in message
    assert "subfolder" in message
    assert contents(folder) == before


def test_main__reports_all_problems_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(folder)
    typed = "codebook tiny --data empty --out full --perceptual.network timm:resnet51 --devices 3"
    lines = fail(typed.split(), capsys).splitlines()
    assert len(lines) == 4
    for part in ("'full' is not empty", "'empty'", "resnet51", "3 devices"):
        assert sum(part in line for line in lines) == 1
    assert contents(folder) == before


def test_main__raises_the_error_with_pecobook_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PECOBOOK_TRACEBACK", "1")
    with pytest.raises(ConfigError, match="codebok"):
        cli.main(["codebok"])


def test_main__an_interruption_exits_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(args: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "dispatch", interrupt)
    with pytest.raises(SystemExit) as caught:
        cli.main([])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "pecobook: interrupted.\n"


# ---------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_main__help_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(arguments)
    output = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert re.search(rf"^  {command} ", output, re.MULTILINE)
    assert max(map(len, output.splitlines())) <= 120


_CHECK_IMPORTS = """
import sys
from pecobook import cli
cli.main(["--help"])
heavy = {"torch", "timm", "numpy", "datasets", "lightning_fabric", "torchvision"} & set(sys.modules)
assert not heavy, heavy
"""


def test_main__help_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", _CHECK_IMPORTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pecobook COMMAND" in done.stdout


def test_main__version(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--version"])
    assert re.fullmatch(r"pecobook \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


# ---------------------------------------------------------------------------------------------------------------- runs


_FORMS = ("", ".sha256")


def test_main__a_run_folder_holds_exactly_the_documented_files(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    more = {"max_steps": "4", "save_every": 2, "sample_every": 2, "loggers": "tensorboard"}
    cli.main(["codebook", "tiny", "--data", str(images), "--out", str(out), *small_flags("codebook", **more)])
    events = [path.name for path in out.glob("events.out.tfevents.*")]
    assert len(events) == 1
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [
            *(*events, "checkpoints", "config.json", "data.parquet", "environment.json", "export", "metrics.jsonl"),
            *("config.diff", "curves.png", "samples", "train.log"),
        ]
    )
    assert sorted(str(path.relative_to(out / "checkpoints")) for path in (out / "checkpoints").rglob("*")) == [
        "step-00000002",
        "step-00000002/state.pt",
        "step-00000002/state.pt.sha256",
        "step-00000004",
        "step-00000004/state.pt",
        "step-00000004/state.pt.sha256",
    ]
    pictures = ["example.png", "step-00000002.png", "step-00000004.png"]
    assert sorted(path.name for path in (out / "samples").iterdir()) == pictures
    files = ["README.md"]
    files += [f"{name}{end}" for name in ("config.json", "model.safetensors", "training.safetensors") for end in _FORMS]
    assert sorted(export_bytes(out)) == sorted(files)
    assert "codebook 4/4" in capsys.readouterr().err


def test_main__config_of_a_run_repeats_the_run(images: Path, tmp_path: Path) -> None:
    first = train("codebook", images, tmp_path / "first", max_steps="4", seed=3)
    cli.main(["codebook", "--config", str(first / "config.json"), "--out", str(tmp_path / "second")])
    assert export_bytes(tmp_path / "second") == export_bytes(first)
    assert losses(tmp_path / "second") == losses(first)
    repeated, original = (json.loads((run / "config.json").read_text()) for run in (tmp_path / "second", first))
    assert {**repeated, "out": ""} == {**original, "out": ""}


def test_main__a_signal_exits_with_130_and_names_resume(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import signal

    def stop(self: object, step: int, total: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("pecobook.stages.moco.MocoStage.after_step", stop)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as caught:
        cli.main(["contrast", "tiny", "--data", str(images), "--out", str(out), *small_flags("contrast")])
    assert caught.value.code == 130
    assert "Continue with --resume." in capsys.readouterr().err
    assert torch.load(out / "checkpoints" / "step-00000003" / "state.pt", weights_only=True)["step"] == 3


def test_main__refuses_to_resume_a_locked_folder(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pecobook.utils.folder_lock import FolderLock

    run = train("codebook", images, tmp_path / "run", max_steps="1")
    lock = FolderLock(run)
    try:
        typed = ["codebook", "tiny", "--data", str(images), "--out", str(run), "--resume"]
        message = fail([*typed, *small_flags("codebook", max_steps="1")], capsys)
    finally:
        lock.release()
    assert "Another process is writing" in message


@pytest.mark.parametrize("command", ["pretrain", "tokenize", "predict"])
@pytest.mark.parametrize(
    ("number", "part"),
    [
        (errno.ENOSPC, "no space left on device.\nFinished files are complete. Make room, then "),
        (errno.EROFS, "read-only file system.\nFinished files are complete. Name a folder"),
        (errno.EACCES, "permission denied.\nAllow this user"),
        (errno.ENOENT, "no such file or directory.\nIt was deleted or moved"),
        (errno.EMFILE, "too many open files.\nAllow more open files"),
        (errno.EIO, "input/output error.\nThe disk failed"),
    ],
)
def test_main__reports_an_error_of_the_system_in_two_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, number: int, part: str
) -> None:
    def fail(_args: list[str]) -> None:
        raise OSError(number, os.strerror(number), "runs/a/metrics.jsonl")

    monkeypatch.setattr(cli, "dispatch", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main([command])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("pecobook: 'runs/a/metrics.jsonl' cannot be used: ")
    assert part in message
    assert len(message.splitlines()) == 2
    assert ("--resume" in message) <= (command in ("pretrain", "tokenize"))
    monkeypatch.setenv("PECOBOOK_TRACEBACK", "1")
    with pytest.raises(OSError, match="metrics"):
        cli.main([command])


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. you tried to allocate 2 PiB")]
)
def test_main__says_when_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail(_args: list[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "dispatch", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main(["pretrain"])
    assert caught.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("pecobook: out of memory: ")
    assert "fewer images at once" in second
    monkeypatch.setenv("PECOBOOK_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main(["pretrain"])


def test_main__an_error_that_is_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_args: list[str]) -> None:
        raise OSError("a mistake of the program")

    monkeypatch.setattr(cli, "dispatch", fail)
    with pytest.raises(OSError, match="mistake"):
        cli.main(["pretrain"])


def stderr_on_each(rank: int, world_size: int, error: Exception) -> str:
    def fail(_args: list[str]) -> None:
        raise error

    original_dispatch = cli.dispatch
    cli.dispatch = fail  # type: ignore[assignment]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.suppress(SystemExit):
            cli.main(["codebook"])
    finally:
        cli.dispatch = original_dispatch
    return stderr.getvalue()


def test_main__after_the_launch_a_rank_prints_an_error_that_it_alone_has(
    two_processes: TwoProcesses, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, shared = PecobookError("out of memory"), NonFiniteLossError("not finite")
    assert two_processes.run(stderr_on_each, alone) == [
        "pecobook: out of memory\n",
        "pecobook: rank 1: out of memory\n",
    ]
    assert two_processes.run(stderr_on_each, shared) == ["pecobook: not finite\n", ""]
    monkeypatch.setenv("RANK", "1")  # before the launch all ranks have the same error
    with pytest.raises(SystemExit):
        cli.main(["codebok"])
    assert capsys.readouterr().err == ""
