"""curves.png: what it shows, when it is drawn, and that it never costs a run."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pecobook.analysis import charts
from pecobook.engine import curves
from pecobook.stages import training
from tests.runs import logged, train

DRAW: Callable[[Path], bytes] = charts.run_curves


def write_log(folder: Path, lines: list[dict[str, Any]]) -> Path:
    log = folder / "metrics.jsonl"
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return log


def panels(monkeypatch: pytest.MonkeyPatch, log: Path) -> dict[str, dict[str, list[float]]]:
    """Return the numbers of each curve by panel and name, as the drawing got them."""
    drawn: dict[str, dict[str, list[float]]] = {}
    monkeypatch.setattr(
        charts,
        "_curve",
        lambda axes, x, y, name, _: drawn.setdefault(axes.get_title(loc="left"), {}).update({name: [*x, *y]}),
    )
    DRAW(log)
    return drawn


def test_run_curves__draws_all_numbers_and_evaluations_beside_their_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write_log(
        tmp_path,
        [
            {"step": 1, "perceptual": 3.0, "loss": 4.0, "lr": 0.1, "images_per_second": 7.0, "grad_norm": None},
            {"step": 2, "perceptual": 2.0, "loss": 3.0, "lr": 0.1, "evaluation/loss": 5.0, "evaluation/knn": 60.0},
        ],
    )
    assert Image.open(io.BytesIO(DRAW(log))).format == "PNG"
    drawn = panels(monkeypatch, log)
    assert list(drawn) == ["loss", "perceptual", "knn", "lr", "images per second"]
    assert drawn["loss"] == {"training": [1, 2, 4, 3], "held-out images": [2, 5]}
    assert drawn["lr"]["training"] == [1, 2, 0.1, 0.1]
    assert drawn["knn"] == {"training": [], "held-out images": [2, 60]}


def test_run_curves__of_an_empty_log_is_empty(tmp_path: Path) -> None:
    assert DRAW(write_log(tmp_path, [])) == b""
    assert DRAW(write_log(tmp_path, [{"step": 1, "loss": None}])) == b""


def test_run_curves__of_a_long_run_draws_few_points(tmp_path: Path) -> None:
    log = write_log(tmp_path, [{"step": step, "loss": 1 / (step + 1)} for step in range(5000)])
    assert Image.open(io.BytesIO(DRAW(log))).width > 300


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(curves, "time", clock)
    return clock


def test_curves__takes_at_most_a_hundredth_of_the_time_and_ends_complete(tmp_path: Path, clock: Clock) -> None:
    times: list[float] = []

    def draw(log: Path) -> bytes:
        assert log == tmp_path / "metrics.jsonl"
        times.append(clock.now)
        clock.now += 2
        return b"%d" % len(times)

    sink = curves.Curves(tmp_path, draw)
    for step in range(1, 1001):
        clock.now += 1
        sink.log({"loss": 1.0} | ({"evaluation/psnr": 1.0} if step % 10 == 0 else {}), step)
        if step % 7 == 0:
            sink.flush()
    assert len(times) >= 4
    assert 2 * len(times) <= clock.now / 100
    sink.log({"loss": 1.0}, 1001)
    sink.close()
    assert (tmp_path / "curves.png").read_bytes() == b"%d" % len(times)
    number = len(times)
    sink.close()
    assert len(times) == number  # nothing is new


def test_curves__an_error_is_said_once_and_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def draw(log: Path) -> bytes:
        raise ImportError("No module named 'matplotlib'")

    sink = curves.Curves(tmp_path, draw)
    for step in (1, 2):
        sink.log({"loss": 1.0}, step)
        sink.close()
    assert capsys.readouterr().err == (
        "curves.png was not drawn: No module named 'matplotlib'. The run is not affected.\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_train__a_resumed_run_draws_the_steps_before_it_too(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_draw_curves", DRAW)
    run = tmp_path / "run"
    train("codebook", images, run, save_every=4)
    first = (run / "curves.png").read_bytes()
    assert Image.open(io.BytesIO(first)).format == "PNG"
    for name in ("export/config.json", "curves.png"):
        (run / name).unlink()
    (run / "checkpoints" / "step-00000008" / "state.pt").unlink()
    train("codebook", images, run, save_every=4, resume=True)
    drawn = panels(monkeypatch, run / "metrics.jsonl")
    assert drawn["loss"]["training"][:8] == [line["step"] for line in logged(run)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert Image.open(run / "curves.png").format == "PNG"
