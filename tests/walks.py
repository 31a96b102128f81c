"""Walks: the commands and the Python of pages, run in their order in one folder, as a newcomer pastes them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from pecobook import cli
from pecobook.recipes import RECIPES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

# Flags behind a command of a page that make it quick: a training of two steps on few images, in this process.
_TRAINING = "--max-steps 2 --batch-size 8 --evaluation-images 8 --workers 0 --precision fp32 --loggers"
_QUICK = {
    **dict.fromkeys(RECIPES, _TRAINING),
    "contrast": f"{_TRAINING} --knn-images 16",
    "detect": _TRAINING.replace("size 8", "size 2"),
    "probe": "--max-train 40 --max-test 20",
    "evaluate": "--num-images 8 --workers 0",
    "check": "--workers 1",
    "embed": "--workers 0",
}
# Commands that take seconds at any size, with tests of their own: a quick walk only reads their flags.
_ONLY_READ = ("analyze",)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return language and text of the page's fenced blocks, in their order."""
    return re.findall(r"```(\w*)\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands(page: Path) -> list[str]:
    """Return the lines of the page's `sh` blocks that call pecobook."""
    lines = [line for language, text in blocks(page) if language == "sh" for line in text.splitlines()]
    return [line for line in lines if line.startswith("pecobook ")]


class Walk:
    """Runs pages in the current folder. A command that an earlier page gave is not run again.

    Args:
        quick: whether commands are shortened by `_QUICK`; without it they run as they stand.
    """

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self.ran: dict[str, int] = {}
        """Exit code of each command."""

    def page(self, page: Path, languages: tuple[str, ...] = ("sh", "python")) -> dict[str, Any]:
        """Run the blocks of a page in these languages; return the names that its Python has defined."""
        names: dict[str, Any] = {}
        for language, text in blocks(page):
            if language == "python" and language in languages:
                exec(compile(text, str(page), "exec"), names)
            elif language == "sh" and language in languages:
                for line in text.splitlines():
                    self._run(line)
        return names

    def _run(self, line: str) -> None:
        program, *words = shlex.split(line, comments=True) or [""]
        if program != "pecobook" or line in self.ran:
            return
        if self.quick and words[0] in _ONLY_READ:
            cli._settings(words[0], words[1:])
            self.ran[line] = 0
            return
        more = shlex.split(_QUICK.get(words[0], "")) if self.quick else []
        try:
            cli.main([*words, *more])
            self.ran[line] = 0
        except SystemExit as end:
            self.ran[line] = int(end.code or 0)
        faulty = words[0] == "check" and self.ran[line] == 1  # the page has a fault to show
        assert self.ran[line] == 0 or faulty, line
