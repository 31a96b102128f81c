from __future__ import annotations

from typing import Any

import pytest
import torch

from pecobook.engine.feed import Feed
from pecobook.engine.skipped import Skipped
from pecobook.engine.speed import Speed


def speed(peak: float | None, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Speed:
    monkeypatch.setattr("pecobook.engine.speed.peak_flops", lambda _: peak)
    settings = {"batch_size": 10, "flop": lambda: 2e12, "num_devices": 2, "precision": "bf16", **more}
    return Speed(100, 1000.0, device=torch.device("cpu"), **settings)


def test_speed__share_of_the_peak_of_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = speed(50e12, monkeypatch)
    measured.waited = 4.0
    assert measured.measure(102, 1016.0) == {"images_per_second": 20 / 16, "data_wait": 0.25}  # not counted yet
    measured.restart(1020.0)
    measured.leave_out(2.0)  # an evaluation
    values = measured.measure(110, 1032.0)  # 80 images in 10 s, on two devices
    assert values == {
        "images_per_second": pytest.approx(8),
        "data_wait": 0.0,
        "tflops": pytest.approx(8),
        "mfu": pytest.approx(8 / 50),
    }


@pytest.mark.parametrize(
    ("peak", "more", "names"),
    [
        (None, {}, {"tflops"}),  # a CPU, or a GPU that the table does not name
        (50e12, {"precision": "fp32"}, {"tflops"}),
        (50e12, {"flop": lambda: None}, set()),
    ],
)
def test_speed__says_only_what_is_known(
    peak: float | None, more: dict[str, Any], names: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = speed(peak, monkeypatch, **more).measure(110, 1100.0)
    assert set(values) == {"images_per_second", "data_wait"} | names


def test_feed__counts_the_wait_and_notes_what_was_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, noted = speed(None, monkeypatch), Skipped(lambda *_: None)
    images = torch.arange(3)
    batches: Any = iter([{"image": images, "boxes": [images], "skipped": ["a.jpg: cut short"]}])
    (batch,) = Feed(batches, torch.device("cpu"), measured, noted)
    assert set(batch) == {"image", "boxes"}
    assert batch["image"] is images  # on a CPU nothing is copied
    assert len(noted) == 1
    assert measured.waited > 0
