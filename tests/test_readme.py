"""The commands and the Python code of the README run unchanged."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pecobook import cli

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


def test_readme__commands_and_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("pecobook ")]
    assert len(commands) == 5
    for command in commands:
        cli.main([*shlex.split(command, comments=True)[1:], *_SMALL.get(command.split()[1], [])])
    assert (tmp_path / "runs" / "classifier" / "export" / "model.safetensors").is_file()

    snippets = blocks("python")
    assert len(snippets) == 1
    names: dict[str, object] = {}
    exec(snippets[0], names)
    codes, again = names["codes"], names["again"]
    assert tuple(codes.shape) == (2, 4, 4)  # type: ignore[attr-defined]
    assert tuple(again.shape) == (2, 3, 32, 32)  # type: ignore[attr-defined]


# Flags that make the README's commands quick enough for a test.
_SMALL = {
    **{
        command: ["--batch-size", "16", "--evaluation-images", "16"]
        for command in ("contrast", "codebook", "pretrain", "finetune")
    },
    "probe": ["--max-train", "200", "--max-test", "60"],
}


def test_readme__lists_every_command() -> None:
    text = README.read_text()
    for command in cli.COMMANDS:
        assert f"`pecobook {command}" in text, command


def test_readme__names_the_test_command_that_ci_runs() -> None:
    assert "make test" in blocks("sh")[0]
    assert "make test" in (README.parent / ".ci" / "run").read_text()


def test_readme__links_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if "://" not in link:
            assert (README.parent / link).exists(), link
