"""Durations: their units, and the steps that they stand for."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pecobook.errors import ConfigError
from pecobook.settings.durations import parse_duration, steps


def refused(text: str) -> Any:
    return pytest.raises(ConfigError, match=re.escape(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5000", (5000.0, "steps")),
        ("1 step", (1.0, "steps")),
        ("100 epochs", (100.0, "epochs")),
        ("1 epoch", (1.0, "epochs")),
        ("2.5ep", (2.5, "epochs")),
        (".5 Epochs", (0.5, "epochs")),
        ("25600 images", (25600.0, "images")),
        ("1 image", (1.0, "images")),
        ("5%", (5.0, "%")),
        (" 5 % ", (5.0, "%")),
        ("1e6 images", (1e6, "images")),
        ("0", (0.0, "steps")),
    ],
)
def test_parse_duration__reads_every_unit(text: str, expected: tuple[float, str]) -> None:
    assert parse_duration(text, "max-steps") == expected


@pytest.mark.parametrize("text", ["", "epochs", "-5", "5 weeks", "5 epochs and 3", "inf", "nan", "1,000", "5e", "0x10"])
def test_parse_duration__refuses(text: str) -> None:
    with refused(f"--warmup is '{text}': give steps (5000)"):
        parse_duration(text, "warmup")


@given(st.integers(0, 10**7), st.integers(1, 10**7), st.integers(1, 10**5))
def test_steps__are_equal_for_epochs_and_images(epochs: int, num_images: int, batch_size: int) -> None:
    in_epochs = steps(f"{epochs} epochs", num_images=num_images, batch_size=batch_size)
    in_images = steps(f"{epochs * num_images} images", num_images=num_images, batch_size=batch_size)
    assert in_epochs == in_images
    assert abs(in_epochs - epochs * num_images / batch_size) <= max(0.5, 1e-9 * in_epochs) or in_epochs == 1
    assert (in_epochs == 0) == (epochs == 0)
    assert steps(f"{epochs}", num_images=num_images, batch_size=batch_size) == epochs


@given(st.floats(0, 100, allow_subnormal=False), st.integers(1, 10**6))
def test_steps__of_a_percentage(percent: float, total: int) -> None:
    count = steps(f"{percent:.3f}%", num_images=7, batch_size=3, total=total)
    exact = float(f"{percent:.3f}") / 100 * total
    assert 0 <= count <= total
    assert abs(count - exact) <= 0.5 or count == 1
    assert (count > 0) == (exact > 0)


def test_steps__refuses_a_percentage_without_a_total() -> None:
    with refused("--max-steps cannot be a percentage"):
        steps("5%", num_images=10, batch_size=2)
