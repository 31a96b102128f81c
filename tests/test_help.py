"""The output of `--help`, `--help-all` and `recipes`, and its agreement with the settings."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest

from pecobook import cli
from pecobook.commands.table import COMMANDS
from pecobook.help import explanations, page
from pecobook.recipes import RECIPES, recipe, tokenize
from pecobook.settings.reproduce import ReproduceConfig
from pecobook.settings.values import flags


def help_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 0
    return capsys.readouterr().out


def settings_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the settings of a command line without running the command."""
    parsed: list[Any] = []
    original_parse = cli.parse

    def parse(config: Any, args: list[str], prog: str, *more: Any) -> Any:
        parsed.append(original_parse(config, args, prog, *more))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cli, "parse", parse)
        with pytest.raises(SystemExit):
            cli.main(words)
    (config,) = parsed
    return config


def test_pages__contain_every_command_with_flags() -> None:
    assert {*COMMANDS, "recipes", "completion"} == set(cli.COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help__fits_a_screen_and_its_examples_can_be_parsed(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = help_of([command, "--help"], capsys)
    lines = output.splitlines()
    assert len(lines) <= 44
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith(f"usage: pecobook {command} ")
    assert "[--flag value ...]" in output
    assert "--config FILE" in output
    for name in RECIPES.get(command, {}):
        assert re.search(rf"^  {name} +\S", output, re.MULTILINE)
    for example in COMMANDS[command].examples:
        assert f"  pecobook {example}\n" in output
        settings_of(shlex.split(example), monkeypatch)
    all_flags = flags(type(settings_of(shlex.split(COMMANDS[command].examples[0]), monkeypatch)))
    assert f"--help-all explains all {len(all_flags) + 1} flags." in output
    for name in COMMANDS[command].flags.split():
        assert name in all_flags
        assert re.search(rf"^  --{re.escape(name)} +\S", output, re.MULTILINE), name


@pytest.mark.parametrize("command", COMMANDS)
def test_help_all__explains_every_flag(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    all_flags = flags(type(settings_of(shlex.split(COMMANDS[command].examples[0]), monkeypatch)))
    capsys.readouterr()
    output = help_of([command, "--help-all"], capsys)
    assert "--config" in output
    for flag in all_flags:
        head, _, leaf = flag.rpartition(".")
        assert f"--{flag}" in output or f"--{head}{'.' if head else ''}no-{leaf}" in output, flag


def test_explanations__come_from_the_most_derived_class() -> None:
    texts = explanations(type(recipe("contrast", "tiny")))
    assert set(flags(type(recipe("contrast", "tiny")))) <= set(texts)
    assert "each image, in two views" in texts["batch-size"]  # in ContrastConfig, not in TrainConfig
    assert texts["optim.clip-grad"].startswith("Largest norm of the whole gradient")


@pytest.mark.parametrize("command", COMMANDS)
def test_explanations__name_their_noun(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(settings_of(shlex.split(COMMANDS[command].examples[0]), monkeypatch))
    names = flags(kind)
    for name, text in explanations(kind).items():
        if name in names:
            words = text.split()
            assert len(words) >= 3, name
            assert words[0] not in ("Of", "Its", "Their", "As", "Who", "Most", "Least"), name
            assert "the same." not in text.lower(), name


def test_page__shows_the_choices_of_a_flag() -> None:
    output = page("reproduce", ReproduceConfig(budget="small"))
    assert re.search(r"^  --budget +Size of the runs\. \(small; or tiny, paper\)$", output, re.MULTILINE)
    assert re.search(r"^  --gpus-per-run .* \(0\)$", output, re.MULTILINE)
    assert re.search(r"^  --transfer .* \(on\)$", output, re.MULTILINE)


def test_page__shows_the_values_of_the_recipe() -> None:
    assert re.search(r"^  --batch-size .*\(16\)$", page("codebook", recipe("codebook", "tiny"), "tiny"), re.MULTILINE)
    assert re.search(r"^  --batch-size .*\(128\)$", page("codebook", recipe("codebook"), "paper"), re.MULTILINE)
    assert re.search(r"^  --image-size .*\(32\)$", page("tokenize", tokenize("tiny"), "tiny"), re.MULTILINE)


_WITHOUT_TORCH = """
import contextlib, io, sys
from pecobook import cli
for command in cli.COMMANDS:
    for flag in ("-h", "--help", "--help-all"):
        with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit):
            cli.main([command, flag])
        assert "usage: pecobook " + command in output.getvalue(), (command, flag)
with contextlib.redirect_stdout(io.StringIO()):
    cli.main(["recipes"])
    cli.main(["completion", "zsh"])
heavy = {"torch", "timm", "numpy", "datasets", "lightning_fabric", "torchvision"} & set(sys.modules)
assert not heavy, heavy
"""


def test_help__loads_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", _WITHOUT_TORCH], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------- recipes


def listed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    cli.main(["recipes", *words])
    return capsys.readouterr().out


def test_recipes__lists_all_recipes_or_those_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    lines = listed([], capsys).splitlines()
    expected = [(command, name) for command, recipes in RECIPES.items() for name in recipes]
    assert [tuple(line.split()[:2]) for line in lines] == expected
    assert all(len(line.split()) > 4 for line in lines)
    lines = listed(["segment"], capsys).splitlines()
    assert [tuple(line.split()[:2]) for line in lines] == [("segment", name) for name in RECIPES["segment"]]
    assert "usage: pecobook recipes" in listed(["--help"], capsys)


def test_recipes__shows_the_full_description_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    output = listed(["codebook", "paper-lite"], capsys)
    assert output.startswith("codebook paper-lite\n")
    for part in ("25.7M parameters", "Source: Table 2", "Command: pecobook codebook paper-lite", "Cost: 296 GFLOP"):
        assert part in output
    assert output == listed(["paper-lite"], capsys)
    many = listed(["tiny"], capsys)
    assert [line for line in many.splitlines() if line and line[0] != " "] == [f"{name} tiny" for name in RECIPES]


def test_recipes__suggests_a_similar_name_for_an_unknown_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["recipes", "codebook", "papr"])
    assert "There is no recipe 'codebook papr'. Did you mean 'paper'?" in capsys.readouterr().err


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["recipes"], ["codebook", "--help"], ["probe", "--help-all"], ["--help"]])
def test_main__ends_quietly_when_the_reader_of_its_output_ends(words: list[str], unbuffered: str) -> None:
    code = f"from pecobook import cli; cli.main({words})"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}  # empty counts as not set
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # before anything is written
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_main__raises_other_broken_pipe_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_off(args: list[str]) -> None:
        raise BrokenPipeError("a worker's pipe")

    monkeypatch.setattr(cli, "dispatch", break_off)
    with pytest.raises(BrokenPipeError, match="a worker's pipe"):
        cli.main(["recipes"])
