"""The completion scripts: bash completes with its script, and all scripts contain the names of the parser."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from pecobook import cli
from pecobook.commands.table import COMMANDS
from pecobook.completion import SHELLS, flags_of, script
from pecobook.errors import ConfigError
from pecobook.recipes import RECIPES
from pecobook.settings.training import TrainConfig
from pecobook.settings.values import flags
from tests.test_help import settings_of

# Sets the variables that bash sets when Tab is pressed, and prints the completions that bash would offer.
_PRESS_TAB = """
source {script}
COMP_WORDS=({words})
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_pecobook
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    path = tmp_path_factory.mktemp("completion") / "pecobook.bash"
    path.write_text(script("bash", cli.COMMANDS))
    return path


def completions(bash_script: Path, words: list[str]) -> list[str]:
    code = _PRESS_TAB.format(script=shlex.quote(str(bash_script)), words=shlex.join(["pecobook", *words]))
    done = subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["cod"], ["codebook"]),
        (["--v"], ["--version"]),
        (["codebook", "paper-"], ["paper-lite", "paper-resnet50", "paper-vgg16"]),
        (["codebook", "paper", "--perceptual.w"], [f"--perceptual.{name}" for name in ("weights", "weight", "warmup")]),
        (["codebook", "--out", "runs/a", "--no-c"], ["--no-compile"]),
        (["codebook", "--model.no"], ["--model.no-latent-norm"]),
        (["codebook", "--help"], ["--help", "--help-all"]),
        (["codebook", "--precision", ""], ["auto", "fp32", "bf16", "fp16"]),
        (["codebook", "--precision", "=", "b"], ["bf16"]),  # --precision=b, which bash splits into three words
        (["codebook", "--precision", "="], ["auto", "fp32", "bf16", "fp16"]),
        (["codebook", "--data", ""], []),  # files, which bash finds itself
        (["export", "runs/vit", "--format", "t"], ["timm"]),
        (["bench", ""], ["pretrain"]),
        (["bench", "pretrain", "tin"], ["tiny", "tiny-imagenet"]),
        (["reproduce", "table4", "table12"], ["table12"]),
        (["reproduce", "--out", "table1"], []),
        (["recipes", "segm"], ["segment"]),
        (["recipes", "segment", "cam"], ["camvid"]),
        (["recipes", "codebook", "paper-v"], ["paper-vgg16"]),  # no paper-vit-l, a recipe of other commands
        (["codebook", "--loggers", "w"], ["wandb"]),
        (["completion", ""], list(SHELLS)),
        (["nothing", ""], []),
    ],
)
def test_bash__completes(bash_script: Path, words: list[str], expected: list[str]) -> None:
    assert sorted(completions(bash_script, words)) == sorted(expected)


def test_bash__offers_every_command_recipe_and_flag(bash_script: Path) -> None:
    assert completions(bash_script, [""]) == list(cli.COMMANDS)
    for command, recipes in RECIPES.items():
        assert completions(bash_script, [command, ""]) == list(recipes)
        assert completions(bash_script, [command, "-"]) == list(flags_of(command))


@pytest.mark.parametrize("command", COMMANDS)
def test_flags__equal_those_of_the_parser(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(settings_of(shlex.split(COMMANDS[command].examples[0]), monkeypatch)) is COMMANDS[command].settings
    types = {**flags(COMMANDS[command].settings), "config": str}
    for name, flag in flags_of(command).items():
        if not name.startswith("--help"):
            (value,) = cli.read_flags([name, *(["1"] if flag.takes_value else [])], types, command, []).values()
            assert value in (("1",), "1") if flag.takes_value else value is (".no-" not in name and "--no-" not in name)
    assert {f"--{name}" for name in types} <= set(flags_of(command))


def test_flags__loggers_are_those_of_the_settings() -> None:
    loggers = flags_of("codebook")["--loggers"].choices
    assert TrainConfig(out="unused", loggers=loggers).loggers == loggers
    with pytest.raises(ConfigError, match=f"takes {', '.join(loggers[:-1])} and {loggers[-1]}, not 'csv'"):
        TrainConfig(out="unused", loggers=("csv",))


@pytest.mark.parametrize("shell", SHELLS)
def test_script__has_no_syntax_error(shell: str, tmp_path: Path) -> None:
    text = script(shell, cli.COMMANDS)
    for command in cli.COMMANDS:
        assert command in text
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    (tmp_path / "script").write_text(text)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True, timeout=60)
