"""What the README lists exists. test_tutorials.py runs its commands and its Python."""

from __future__ import annotations

import re
from pathlib import Path

from pecobook import cli

README = Path(__file__).parent.parent / "README.md"


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)


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
