"""Intervals over seeds agree with scipy and with numbers computed by hand, and cover what they promise to cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pecobook.analysis.evidence import Difference, Verdict, difference, family, holm, outer_means, signed

VALUES = st.lists(st.floats(-100, 100).map(lambda x: round(x, 3)), min_size=2, max_size=12)


def test_interval__by_hand() -> None:
    # Mean 1.9667, standard deviation 1.0017, standard error 0.57831; t(0.975, 2 degrees of freedom) is 4.30265.
    shown = Difference("x", (1.6, 1.2, 3.1))
    assert shown.mean == pytest.approx(1.96667, abs=1e-4)
    assert shown.interval == pytest.approx((-0.52164, 4.45497), abs=1e-4)
    assert shown.verdict is Verdict.UNCLEAR  # three equal signs are no claim
    assert shown.sentence() == "x: +2.0 [−0.5, +4.5] (seeds: +1.6, +1.2, +3.1): not shown (p 0.077)"
    higher = Difference("x", (5.6, 5.0, 5.1))
    assert higher.sentence() == "x: +5.2 [+4.4, +6.0] (seeds: +5.6, +5.0, +5.1): shown to be higher (p 0.0013)"
    assert Difference("x", (-5.6, -5.0, -5.1)).verdict is Verdict.LOWER


def test_sentence__never_rounds_a_number_to_the_limit_that_it_is_judged_by() -> None:
    """`[+0.0, +3.9]: shown to be higher` and `not shown (p 0.05)` would contradict themselves."""
    narrow = Difference("x", (0.85, 1.0, 3.0, 3.05))
    assert narrow.interval[0] == pytest.approx(1.975 - 3.182446 * 0.607076, abs=1e-5)
    assert narrow.sentence() == "x: +2.0 [+0.04, +3.9] (seeds: +0.8, +1.0, +3.0, +3.0): shown to be higher (p 0.047)"
    for p, text in ((0.0504, "not shown (p 0.0504 "), (0.0496, "to be higher (p 0.0496 "), (0.05, "higher (p 0.05 ")):
        assert text in Difference("x", (0.85, 1.0, 3.0, 3.05), p).conclusion()
    assert [signed(value, limit=2.0) for value in (1.96, 2.0, 2.04, 1.9999, -2.0)] == [
        *("+1.96", "+2.0", "+2.04", "+1.9999", "−2.0"),
    ]
    assert [signed(value) for value in (0.0, -0.04, 1e-12, math.nan)] == ["+0.0", "−0.04", "+0.000000000", "+nan"]


@given(VALUES)
def test_interval__is_that_of_scipy(values: list[float]) -> None:
    measured = Difference("x", tuple(values))
    if np.std(values) < 1e-6:
        return
    result = stats.ttest_1samp(values, 0.0)
    low, high = result.confidence_interval(0.95)
    assert measured.interval == pytest.approx((low, high), rel=1e-6, abs=1e-6)
    assert measured.p == pytest.approx(result.pvalue, rel=1e-6, abs=1e-12)
    assert (measured.verdict in (Verdict.HIGHER, Verdict.LOWER)) == (low > 0 or high < 0)


def test_interval__covers_the_truth_in_95_of_100_studies() -> None:
    draws = np.random.default_rng(0).normal(1.5, 2.0, size=(2000, 4))
    intervals = [Difference("x", tuple(row)).interval for row in draws]
    covered = np.mean([low <= 1.5 <= high for low, high in intervals])
    assert covered == pytest.approx(0.95, abs=0.015)  # three standard errors of 2,000 studies


def test_difference__pairs_by_seed_and_needs_two() -> None:
    paired = difference("x", {0: 5.0, 1: 7.0, 3: 1.0}, {3: 4.0, 1: 6.0, 2: 9.0})
    assert paired.values == (1.0, -3.0)
    one = difference("x", {0: 5.0}, {0: 4.0})
    assert one.verdict is Verdict.UNKNOWN
    assert one.sentence() == "x: +1.0 (seeds: +1.0): not judged, one seed has no interval"
    assert difference("x", {0: 5.0}, {1: 4.0}).amount() == "–"
    equal = Difference("x", (2.0, 2.0, 2.0))  # such as accuracies on ten images: no spread, so no error
    assert equal.verdict is Verdict.UNKNOWN
    assert equal.conclusion() == "not judged, no spread over seeds"
    assert Difference("x", (1.0, math.nan, 2.0)).verdict is Verdict.UNKNOWN


def test_difference__of_equal_gains_shows_no_spread() -> None:
    """60.3 - 60.1, 50.3 - 50.1 and 40.3 - 40.1 differ in the last bits of floats alone."""
    pairs = {0: (60.3, 60.1), 1: (50.3, 50.1), 2: (40.3, 40.1)}
    gain = difference("", {seed: a for seed, (a, _) in pairs.items()}, {seed: b for seed, (_, b) in pairs.items()})
    assert gain.values == (0.2, 0.2, 0.2)
    assert gain.verdict is Verdict.UNKNOWN
    assert "no spread over seeds" in gain.sentence()


def test_holm__by_hand() -> None:
    # Holm 1979: 0.01 * 4, 0.02 * 3, 0.03 * 2 raised to the value before it, 0.5 * 1.
    assert holm([0.03, 0.5, 0.01, 0.02]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([]) == []
    assert holm([0.4]) == [0.4]
    assert math.isnan(holm([0.01, math.nan])[1])
    assert holm([0.01, math.nan])[0] == 0.01
    assert holm([0.02, 0.01], size=4) == pytest.approx([0.06, 0.04])  # as if the other two had p values of 1
    assert holm([0.02, 0.01, 1.0, 1.0])[:2] == pytest.approx([0.06, 0.04])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm__keeps_the_order_and_lies_between_the_p_value_and_bonferroni(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for p, corrected in zip(p_values, adjusted, strict=True):
        assert p <= corrected <= min(1.0, len(p_values) * p) + 1e-12
    order = np.argsort(p_values, kind="stable")
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)


def test_family__claims_nothing_in_95_of_100_families_without_effects() -> None:
    draws = np.random.default_rng(1).normal(0.0, 1.0, size=(1000, 6, 3))
    claims = [
        any(
            member.verdict in (Verdict.HIGHER, Verdict.LOWER)
            for member in family(Difference("x", tuple(row)) for row in rows)
        )
        for rows in draws
    ]
    assert np.mean(claims) <= 0.05 + 0.02


def test_family__needs_both_the_interval_and_the_correction() -> None:
    strong, weak = Difference("a", (5.6, 5.0, 5.1)), Difference("b", (1.0, 1.6, 2.0))
    assert weak.verdict is Verdict.HIGHER
    assert family([weak]) == [weak]
    noise = [Difference("c", (0.1, -0.2, 0.3)), Difference("d", (0.2, 0.3, -0.1))]
    corrected = {member.name: member for member in family([strong, weak, *noise])}
    assert corrected["a"].verdict is Verdict.HIGHER
    assert corrected["b"].verdict is Verdict.UNCLEAR
    assert corrected["b"].conclusion() == "not shown (p 0.10 after Holm's correction)"


def test_outer_means__average_within_a_network_first() -> None:
    nested: dict[tuple[int, ...], float] = {(0, 0, 0): 1.0, (0, 0, 1): 3.0, (0, 1, 0): 6.0, (1, 0, 0): 5.0}
    assert outer_means(nested) == {0: 4.0, 1: 5.0}  # ((1 + 3) / 2 + 6) / 2
    assert outer_means({(0,): 1.0, (7,): 2.0}) == {0: 1.0, 7: 2.0}


def test_outer_means__keep_the_interval_honest_when_trainings_share_a_network() -> None:
    """Four trainings on each of three networks are three independent units, not twelve."""
    rng = np.random.default_rng(2)
    wrong = honest = 0
    for _ in range(400):
        networks = rng.normal(0.0, 1.0, size=3)
        nested: dict[tuple[int, ...], float] = {
            (n, v): networks[n] + rng.normal(0.0, 0.3) for n in range(3) for v in range(4)
        }
        claimed = (Verdict.HIGHER, Verdict.LOWER)
        wrong += Difference("x", tuple(nested.values())).verdict in claimed
        honest += Difference("x", tuple(outer_means(nested).values())).verdict in claimed
    assert honest <= 0.05 * 400 + 13
    assert wrong > 0.2 * 400
