from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from pecobook.data.decode import BadImage
from pecobook.engine.log import Progress, compact_duration, open_text_log
from pecobook.utils.printer import say


def test_progress__prints_plain_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total=100, start=90, name="codebook", quiet=False)
    for step in range(91, 101):
        progress.show(
            step,
            {
                "loss": 0.5,
                "images_per_second": 1234.0,
                "data_wait": 0.25,
                "tflops": 123.4,
                "mfu": 0.345,
                "gpu_memory": 9.87,
            },
        )
    say("a word")
    progress.close()
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "codebook 91/100  loss 0.5000  1234 img/s  data wait 25%  123 TFLOP/s  MFU 34%  9.9 GB"
    assert lines[1].startswith("codebook 100/100  ")  # the steps between came within five seconds
    assert lines[2:] == ["a word"]


def test_progress__estimates_the_time_left_from_the_steps_after_the_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    progress = Progress(total=10, start=0, name="codebook", quiet=False)

    def after(seconds: float) -> Progress:
        clock[0] += seconds
        return progress

    after(100).show(1, {"loss": 2.0}, now=True)  # the first step compiles and starts workers
    after(3).show(2, {"loss": 1.0}, now=True)
    after(3).tick(3)
    after(3).show(4, {"loss": 0.5})
    after(27).tick(5)
    after(5).tick(6)
    assert capsys.readouterr().err.splitlines() == [
        "codebook 1/10  loss 2.0000",
        "codebook 2/10  loss 1.0000  left 24s",
        "codebook 4/10  loss 0.5000  left 18s",
        "codebook 6/10  loss 0.5000  left 33s",  # 41 seconds for 5 steps, and more than 30 since the last line
    ]


def test_progress__prints_nothing_on_other_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total=2, start=0, name="codebook", quiet=True)
    progress.show(2, {"loss": 0.5})
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_progress__shows_a_bar_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    progress = Progress(total=20, start=0, name="pretrain", quiet=False)
    progress.show(10, {"loss": 0.5, "images_per_second": 80.0})
    say("a word")
    progress.close()
    output = terminal.getvalue()
    for part in ("pretrain", "10/20", "loss 0.5000", "80 img/s", "a word"):
        assert part in output


def test_progress__moves_with_each_step_and_names_its_times_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "80")
    progress = Progress(total=20, start=0, name="pretrain", quiet=False)
    metrics = {"loss": 0.5, "images_per_second": 80.0, "data_wait": 0.5, "tflops": 12.5, "mfu": 0.25, "gpu_memory": 9.5}
    progress.show(1, metrics)
    progress.tick(2)
    progress.tick(3)
    progress.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).split("\r")[-1].strip().splitlines()[-1]
    assert re.fullmatch(r"pretrain \S+ +3/20 elapsed 0:00:00 left 0s loss 0.5000 .*…", shown.strip()), shown
    assert len(shown) <= 80


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(0, "0s"), (0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (89, "1m29s"), (120, "2m00s"), (200, "3m20s")],
        *[(5400, "1h30m"), (18120, "5h02m"), (273600, "3d04h")],
    ],
)
def test_compact_duration__gives_the_two_largest_units(seconds: float, text: str) -> None:
    assert compact_duration(seconds) == text


def test_open_text_log__and_progress_escape_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    name = "a[/b]\x1b[31m.png"
    open_text_log(tmp_path).info("skipped %s", BadImage(f"{name}\n2026 forged", "broken"))
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("skipped a[/b]\\x1b[31m.png\\n2026 forged: broken")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    progress = Progress(total=1, start=0, name="train", quiet=False)
    say(name)
    progress.close()
    assert "a[/b]\\x1b[31m.png" in terminal.getvalue()
