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
    """The working folder: an empty folder, unreadable images, a text file, a filled folder, several configurations."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PECOBOOK_TRACEBACK", raising=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for number in range(3):
        (tmp_path / "broken" / f"{number}.jpg").write_bytes(b"no image at all")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "photos-2024").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").touch()
    for name, text in {
        "broken.json": '{"seed": ',
        "list.json": "[1]",
        "unknown.json": '{"bach_size": 8}',
        "typed.json": '{"optim": {"lr": "fast"}}',
        "flat.json": '{"optim": 3}',
        "contrast.json": '{"command": "contrast", "seed": 3, "momentum": 0.5}',
        "null.json": '{"perceptual": {"layers": null}}',
    }.items():
        (tmp_path / name).write_text(text)
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


DATA = ("--data", "photos")
RUN = ("--data", "photos", "--out", "run")

# The command line, and two parts of the error message: the wrong value and the remedy.
MISTAKES: list[tuple[str, str, str]] = [
    ("codebok tiny", "codebok", "Did you mean 'codebook'?"),
    ("--data photos", "--data", "pecobook --help"),
    ("completion fisch", "'fisch'", "Did you mean 'fish'?"),
    ("completion bash zsh", "2 words", "one shell"),
    ("recipes all", "all", "'pecobook recipes' lists them"),
    ("codebook tinny --data photos --out run", "tinny", "Did you mean 'tiny'?"),
    ("codebook nothing-like-it --data photos --out run", "nothing-like-it", "tiny, cifar10"),
    ("codebook tiny more --data photos --out run", "'more' is no flag", "--name value"),
    ("codebook tiny --dta photos --out run", "--dta", "Did you mean '--data'?"),
    ("codebook tiny --data photos --out run --lr 1", "--lr", "Did you mean '--optim.lr'?"),
    ("codebook tiny --data photos --out run --zzz 1", "--zzz", "pecobook codebook --help"),
    ("codebook tiny --data photos --out run --batch-size many", "many", "a whole number"),
    ("codebook tiny --data photos --out run --batch-size 7.5", "7.5", "a whole number"),
    ("codebook tiny --data photos --out run --batch-size 0", "0", "above 0"),
    ("codebook tiny --data photos --out run --optim.lr fast", "fast", "a number"),
    ("codebook tiny --data photos --out run --optim.lr -1", "-1", "above 0"),
    ("codebook tiny --data photos --out run --optim.betas 0.9", "--optim.betas", "2 values"),
    ("codebook tiny --data photos --out run --resume perhaps", "perhaps", "true or false"),
    ("codebook tiny --data photos --out run --precision fp64", "fp64", "Did you mean"),
    ("codebook tiny --data photos --out run --precision fp16", "fp16", "use bf16 or fp32"),
    ("codebook tiny --data photos --out run --max-steps soon", "soon", "100 epochs"),
    ("codebook tiny --data photos --out run --max-steps 5%", "5%", "give steps or epochs"),
    ("codebook tiny --data photos --out run --max-steps 100 epochs", "100 epochs", "quote"),
    ("codebook tiny --data photos --out run --devices none", "none", "or auto"),
    ("codebook tiny --data photos --out run --devices 3", "16", "3 devices"),
    ("codebook tiny --data photos --out run --micro-batch-size -3", "-3", "or above"),
    ("codebook tiny --data photos --out run --loggers tensorbord", "tensorbord", "tensorboard, wandb and mlflow"),
    ("codebook tiny --data photos --out run --resume --overwrite", "--resume and --overwrite", "one of them"),
    ("codebook tiny --data photos --out run --image-size 33", "33", "multiple of 8"),
    ("codebook tiny --data photos --out", "--out", "needs a value"),
    ("codebook tiny --data= --out run", "--data is missing", "A source is"),
    ("codebook tiny --data photos", "--out is missing", "for example"),
    ("codebook tiny --data nowhere --out run", "nowhere", "A source is"),
    ("codebook tiny --data photos-2023 --out run", "photos-2023", "Did you mean 'photos-2024'?"),
    ("codebook tiny --data empty --out run", "empty", "Supported extensions"),
    ("codebook tiny --data broken --out run", "broken", "can be read"),
    ("codebook tiny --data notes.txt --out run", "notes.txt", "give the folder"),
    ("codebook tiny --data photos --out full", "full", "--overwrite"),
    ("codebook tiny --data photos --out full --overwrite", "full", "does not look like a run"),
    ("codebook tiny --data photos --out full --resume", "full", "Leave --resume out"),
    ("codebook tiny --data photos --out notes.txt", "notes.txt", "name a folder"),
    ("codebook tiny --data photos --out notes.txt/run", "notes.txt", "is a file"),
    ("codebook cifar10 --data photos --out run", "--perceptual.network is missing", "none for pixels alone"),
    ("codebook tiny --data photos --out run --perceptual.network resnet50", "resnet50", "timm:NAME"),
    ("codebook tiny --data photos --out run --perceptual.network timm:resnet51", "resnet51", "Did you mean 'resnet5"),
    ("codebook tiny --data photos --out run --perceptual.network runs/none", "runs/none", "timm:NAME"),
    ("codebook tiny --data photos --out run --perceptual.network empty", "empty", "not a finished run"),
    (
        "codebook tiny --data photos --out run --perceptual.network timm:resnet10t --perceptual.weights random "
        "--perceptual.layers 3 6",
        "3 6",
        "layers 1 to 4",
    ),
    ("contrast tiny --data photos --out run --model.args {", "{", "not JSON"),
    ("contrast tiny --data photos --out run --model.args 3", "3", "JSON object"),
    ('contrast tiny --data photos --out run --model.args {"dept":3}', "dept", "does not accept"),
    ("contrast tiny --data photos --out run --batch-size 1", "--batch-size", "at least 2 images"),
    ("pretrain tiny --data photos --out run", "--tokenizer is missing", "codebook run"),
    ("pretrain tiny --data photos --out run --tokenizer full", "full", "not a finished run"),
    ("finetune tiny --data photos --out run", "--backbone is missing", "timm:NAME"),
    (
        "finetune tiny --data photos --out run --backbone timm:vit_tiny_patch16_225",
        "patch16_225",
        "Did you mean 'vit_tiny_patch16_224'",
    ),
    ("codebook tiny --config gone.json --data photos --out run", "gone.json", "no configuration file"),
    ("codebook tiny --config broken.json --data photos --out run", "broken.json", "cannot be read"),
    ("codebook tiny --config list.json --data photos --out run", "list.json", "JSON object"),
    ("codebook tiny --config unknown.json --data photos --out run", "bach_size", "Did you mean 'batch_size'?"),
    ("codebook tiny --config typed.json --data photos --out run", "fast", "a number"),
    ("codebook tiny --config flat.json --data photos --out run", "--optim", "not '3'"),
    ("codebook tiny --config null.json --data photos --out run", "--perceptual.layers", "not 'None'"),
    (
        "finetune tiny --config contrast.json --data photos --out run",
        "--config 'contrast.json' is a configuration of 'contrast'",
        "not of 'finetune'",
    ),
    ("codebook --data photos tiny --out run", "not 2 (photos tiny)", "give the recipe 'tiny' before the flags"),
    ("tokenize --data photos tiny --out run", "not 2 (photos tiny)", "give the recipe 'tiny' before the flags"),
    ("codebook --data photos all --out run", "not 2 (photos all)", "quote a value with spaces"),
    (
        "codebook tiny --tokenizer runs/codebook --out run",
        "Unknown flag '--tokenizer'. See",
        "pecobook codebook --help",
    ),
    ("bench pretrain --workers 3", "Unknown flag '--workers'. See", "pecobook bench --help"),
    ("analyze --masked", "Unknown flag '--masked'. See", "pecobook analyze --help"),
    ("codebook tiny --config empty --data photos --out run", "empty", "no configuration file"),
    ("probe --data photos", "--backbone is missing", "timm:NAME"),
    ("export", "--run, --out are missing", "pecobook export RUN"),
    ("export runs/vit", "--out is missing", "--out DIR"),
    ("predict", "--run, --images, --out are missing", "pecobook predict RUN IMAGES"),
]


@pytest.mark.parametrize(("typed", "value", "remedy"), MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_main__reports_a_user_error_in_at_most_three_lines_and_creates_nothing(
    typed: str, value: str, remedy: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    message = fail(typed.split(" ") if "100 epochs" not in typed else typed.split(), capsys)
    assert 1 <= len(message.splitlines()) <= 3
    assert value in message
    assert remedy in message
    assert contents(folder) == before


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


def test_main__a_run_folder_holds_exactly_the_documented_files(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    more = {"max_steps": "4", "save_every": 2, "sample_every": 2, "loggers": "tensorboard"}
    cli.main(["codebook", "tiny", "--data", str(images), "--out", str(out), *small_flags("codebook", **more)])
    events = [path.name for path in out.glob("events.out.tfevents.*")]
    assert len(events) == 1
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*events, "checkpoints", "config.json", "environment.json", "export", "metrics.jsonl", "samples", "train.log"]
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
    files = ["README.md", "config.json", "config.json.sha256", "model.safetensors", "model.safetensors.sha256"]
    assert sorted(export_bytes(out)) == files
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
