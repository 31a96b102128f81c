"""The one printer: what is escaped, where it goes, and that nothing else prints."""

from __future__ import annotations

import ast
import errno
import io
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pecobook
from pecobook.engine.log import open_text_log
from pecobook.utils.printer import doing, of_run, print_above, say, show, write_notes_to

HOSTILE = "a[/b]\x1b[2J\u202e.png"
ESCAPED = "a[/b]\\x1b[2J\\u202e.png"


def test_show__escapes_control_characters_and_keeps_line_breaks(capsys: pytest.CaptureFixture[str]) -> None:
    show(f"{HOSTILE}\n\tsecond", stdout=True)
    show(HOSTILE)
    assert capsys.readouterr() == (f"{ESCAPED}\n\tsecond\n", f"{ESCAPED}\n")


def test_say__notes_from_before_the_log_reach_the_log_once_and_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say("before every run")
    with of_run(quiet=False):
        say(HOSTILE)
        show("progress")
        log = open_text_log(tmp_path)
        log.info("start")
        say("after")
        write_notes_to(None)
        say("when the log is closed")
    lines = [line.split(maxsplit=2)[2] for line in (tmp_path / "train.log").read_text().splitlines()]
    assert lines == [ESCAPED, "start", "after"]
    printed = ["before every run", ESCAPED, "progress", "after", "when the log is closed"]
    assert capsys.readouterr().err.splitlines() == printed


def test_say__a_quiet_process_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with of_run(quiet=True):
        say("a note")
        show("a line")
    show("after the run")
    assert capsys.readouterr() == ("", "after the run\n")


def test_show__prints_above_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    above: list[str] = []
    print_above(above.append)
    try:
        show(HOSTILE)
        show("result", stdout=True)
    finally:
        print_above(None)
    assert above == [ESCAPED]
    assert capsys.readouterr() == ("result\n", "")


def test_show__a_lost_screen_ends_no_run_and_a_closed_pipe_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("sys.stderr", Gone())
    show("a note")
    print_above(Gone().write)  # type: ignore[arg-type]
    try:
        show("above a bar")
    finally:
        print_above(None)
    monkeypatch.setattr("sys.stdout", Gone())
    with pytest.raises(OSError, match="Input/output"):
        show("a result", stdout=True)


def test_nothing_else_prints() -> None:
    """No other module calls `print` or writes to a standard stream, past the escapes."""
    root = Path(pecobook.__file__).parent
    printers = ("print", "sys.stderr.write", "sys.stdout.write", "sys.stdout.writelines", "console.print")
    found = [
        f"{file.relative_to(root)}:{node.lineno}"
        for file in root.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in printers
    ]
    assert {place.partition(":")[0] for place in found} == {"utils/printer.py"}


def test_doing__is_a_live_line_that_the_next_output_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, slave = pty.openpty()
    with os.fdopen(slave, "w") as screen:
        monkeypatch.setattr("sys.stderr", screen)
        doing("loading PyTorch")
        time.sleep(1.2)
        doing("listing images\x1b[2J")
        show("done")
        doing("")
        text = ""
        while "done" not in text:  # a terminal hands over what was written in parts
            text += os.read(terminal, 4096).decode()
    os.close(terminal)
    assert re.split(r"\r\x1b\[2K", text) == [
        "",
        "loading PyTorch",
        "loading PyTorch, 1 s",
        "",
        "listing images\\x1b[2J",
        "done\r\n",
    ]


def test_doing__is_a_plain_line_in_a_log_if_it_takes_long(capsys: pytest.CaptureFixture[str]) -> None:
    doing("loading PyTorch", after=0)
    doing("a moment", after=60)
    doing("listing images", after=0.01)
    time.sleep(0.3)
    show("done")
    assert capsys.readouterr().err == "Loading PyTorch.\nListing images.\ndone\n"


def test_a_command_says_at_once_what_it_does() -> None:
    """The first text on a terminal comes before PyTorch is imported, which takes seconds."""
    program = (
        "import sys; sys.modules['torch'] = None; del sys.modules['torch']\n"
        "import builtins, pecobook.cli as cli; real = builtins.__import__\n"
        "def no_torch(name, *rest):\n"
        "    if name.split('.')[0] == 'torch': raise SystemExit('torch is imported')\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = no_torch\n"
        "cli.main(['codebook', 'tiny', '--data', 'photos', '--out', 'nowhere'])\n"
    )
    terminal, slave = pty.openpty()
    done = subprocess.run([sys.executable, "-c", program], stdout=slave, stderr=slave, timeout=60)
    os.close(slave)
    text = os.read(terminal, 4096).decode()
    os.close(terminal)
    assert done.returncode == 1
    assert re.split(r"\r\x1b\[2K", text)[1] == "loading PyTorch"
