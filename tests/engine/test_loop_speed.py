"""The speed that a run reports, under a clock that only this test moves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pecobook.data.batch import Batch
from pecobook.engine import feed, loop
from pecobook.engine.stage import StageOutput
from tests.engine.test_loop import Toy, run
from tests.runs import logged


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Slow(Toy):
    """A stage that takes 3 seconds for a step and 50 seconds for a held-out batch."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def forward(self, batch: Batch) -> StageOutput:
        self.clock.now += 3 if self.training else 50
        return super().forward(batch)


def test_fit__measures_speed_and_data_wait_of_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    load: Any = vars(loop)["load"]

    def slow_load(*args: Any, **kwargs: Any) -> Iterator[Batch]:
        for batch in load(*args, **kwargs):
            clock.now += 1
            yield batch

    monkeypatch.setattr(loop, "load", slow_load)
    for module in (loop, feed):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    run(tmp_path, Slow(clock), log_every=2, sample_every=2, max_steps="6", save_minutes=1e6)
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:  # 4 images a step, 1 + 3 seconds; the evaluation between two lines does not count
        assert line["images_per_second"] == pytest.approx(4 / 4)
        assert line["data_wait"] == pytest.approx(1 / 4)
