"""Schedules as functions: values at the ends and in the middle, and the direction."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pecobook.engine.optim import learning_rates, warmup_warning
from pecobook.engine.schedule import cosine, is_time, warmup_constant, warmup_cosine, warmup_poly, warmup_steps
from pecobook.settings.training import OptimConfig


def test_warmup_cosine__by_hand() -> None:
    rates = [warmup_cosine(step, total=14, warmup=4, peak=8.0, final=2.0) for step in range(15)]
    assert rates[:4] == [2.0, 4.0, 6.0, 8.0]  # the first step already moves, the last of the warm-up is at the peak
    assert rates[4] == 8.0
    assert rates[9] == pytest.approx(5.0)  # half-way, the mean of both ends
    assert rates[14] == pytest.approx(2.0)
    assert warmup_cosine(99, total=14, warmup=4, peak=8.0, final=2.0) == pytest.approx(2.0)


def test_warmup_cosine__without_warm_up_starts_at_the_peak() -> None:
    assert warmup_cosine(0, total=10, warmup=0, peak=3.0) == 3.0
    assert warmup_cosine(10, total=10, warmup=0, peak=3.0) == pytest.approx(0)


@given(st.integers(1, 500), st.integers(0, 600), st.floats(1e-6, 10), st.floats(0, 1))
def test_warmup_cosine__rises_then_falls_and_stays_in_bounds(
    total: int, warmup: int, peak: float, share: float
) -> None:
    final = share * peak
    rates = [warmup_cosine(step, total=total, warmup=warmup, peak=peak, final=final) for step in range(total)]
    tolerance = 1e-9 * peak
    rise, fall = rates[:warmup], rates[warmup:]
    assert all(later > earlier for earlier, later in itertools.pairwise(rise))
    assert all(later <= earlier + tolerance for earlier, later in itertools.pairwise(fall))
    assert all(0 < rate <= peak + tolerance for rate in rise)
    assert all(final - tolerance <= rate <= peak + tolerance for rate in fall)


def test_cosine__by_hand() -> None:
    values = [cosine(step, total=4, start=0.99, end=1.0) for step in range(5)]
    assert values[0] == pytest.approx(0.99)
    assert values[1] == pytest.approx(0.99 + 0.01 * (1 - 2**-0.5) / 2)
    assert values[2] == pytest.approx(0.995)
    assert values[4] == pytest.approx(1.0)
    assert cosine(9, total=4, start=0.99, end=1.0) == pytest.approx(1.0)
    assert cosine(0, total=0, start=0.99, end=1.0) == pytest.approx(0.99)


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_is_time__is_true_at_multiples_and_at_the_end(every: int, total: int) -> None:
    due = [step for step in range(1, total + 1) if is_time(step, every, total)]
    assert due == sorted({*range(every, total + 1, every), total})


def test_warmup_poly__by_hand() -> None:
    rates = [warmup_poly(step, total=14, warmup=4, peak=8.0, final=2.0) for step in range(15)]
    assert rates[:5] == [2.0, 4.0, 6.0, 8.0, 8.0]
    assert rates[9] == pytest.approx(5.0)  # a straight line
    assert rates[14] == pytest.approx(2.0)
    assert warmup_poly(99, total=14, warmup=4, peak=8.0, final=2.0) == pytest.approx(2.0)
    assert warmup_poly(5, total=10, warmup=0, peak=4.0, power=2.0) == pytest.approx(1.0)


def test_warmup_steps__by_hand() -> None:
    rates = [warmup_steps(step, warmup=2, peak=4.0, milestones=(5, 7)) for step in range(9)]
    assert rates == pytest.approx([2.0, 4.0, 4.0, 4.0, 4.0, 0.4, 0.4, 0.04, 0.04])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "cosine", "final_lr": 0.1}, [0.5, 1.0, 1.0, 0.55, 0.1]),
        ({"schedule": "poly", "power": 2.0}, [0.5, 1.0, 1.0, 0.25, 0.0]),
        ({"schedule": "steps", "milestones": ("1 epochs", "80%")}, [0.5, 1.0, 1.0, 0.1, 0.01]),
    ],
)
def test_learning_rates__follow_the_settings(settings: dict[str, Any], expected: list[float]) -> None:
    """Ten steps of which two warm up, an epoch being five: at steps 0, 1, 2, 6 and 10."""
    config = OptimConfig(lr=1.0, warmup="20%", **settings)
    rates = learning_rates(config, total=10, num_images=20, batch_size=4)
    assert [rates(step) for step in (0, 1, 2, 6, 10)] == pytest.approx(expected)


def test_learning_rates__the_final_rate_would_come_one_step_after_the_last() -> None:
    config = OptimConfig(lr=1.0, final_lr=0.1, warmup="0")
    rates = learning_rates(config, total=4, num_images=10, batch_size=2)
    assert rates(3) == pytest.approx(0.2318, abs=1e-4)
    assert rates(4) == pytest.approx(0.1)


def test_warmup_warning__warns_only_of_a_warmup_longer_than_the_training() -> None:
    sizes = {"total": 10, "num_images": 20, "batch_size": 4}
    assert warmup_warning(OptimConfig(warmup="2 epochs"), **sizes) is None
    assert "takes 11 steps but the training 10" in str(warmup_warning(OptimConfig(warmup="11"), **sizes))


def test_warmup_constant__rates_before_the_cooldown_do_not_depend_on_the_length() -> None:
    def rates(total: int, cooldown: int) -> list[float]:
        options = {"total": total, "warmup": 4, "cooldown": cooldown}
        return [warmup_constant(step, peak=2.0, final=1.0, **options) for step in range(total + 1)]

    assert rates(12, 4) == [0.5, 1.0, 1.5, 2.0, *[2.0] * 5, 1.75, 1.5, 1.25, 1.0]
    assert rates(12, 0) == [0.5, 1.0, 1.5, *[2.0] * 10]
    assert rates(30, 10)[:9] == rates(12, 4)[:9]
