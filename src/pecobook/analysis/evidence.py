"""What several training runs show: paired differences over seeds, their intervals, and one rule for claims.

A training run is repeated with other seeds, and two arms are compared seed by seed. The mean of the differences has a t
interval. A claim is made only if the interval excludes 0 and, if several differences are read together, only if Holm's
correction agrees. Everything else is "not shown", which does not mean that there is no difference.

Seeds can be nested, like ViTs within codebooks within networks. Runs that share a codebook are not independent, so the
differences are averaged within each outermost unit first, and the interval counts these units. With equally many runs
in every unit this is the interval of a mixed model with random effects.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

LEVEL = 0.95
"""Confidence of every interval; 1 minus it is the probability of a wrong claim in a family of comparisons."""

_MOST_DIGITS = 9
"""Digits after the point of a difference."""


class Verdict(Enum):
    """The conclusion that a difference a - b supports."""

    HIGHER = "higher"
    LOWER = "lower"
    UNCLEAR = "unclear"
    UNKNOWN = "unknown"


def verdict_of(low: float, high: float) -> Verdict:
    """Return HIGHER or LOWER if the interval excludes 0, UNKNOWN if an end is not a number, else UNCLEAR."""
    if math.isnan(low) or math.isnan(high):
        return Verdict.UNKNOWN
    return Verdict.HIGHER if low > 0 else Verdict.LOWER if high < 0 else Verdict.UNCLEAR


@dataclass(frozen=True)
class Difference:
    """Paired differences a - b over independent units (seeds), and what they show."""

    name: str
    """What is compared, as `fine-tuned, %: perceptual minus control`."""
    values: tuple[float, ...]
    """One difference for each unit."""
    adjusted_p: float | None = None
    """The p value after the correction for its family; None for a difference read on its own."""

    @property
    def mean(self) -> float:
        """The mean difference; NaN without values."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def half_width(self) -> float:
        """Half the length of the t interval; NaN if the units give no error: fewer than two, or all equal."""
        from scipy import stats

        return float(stats.t.ppf((1 + LEVEL) / 2, len(self.values) - 1)) * self._error

    @property
    def interval(self) -> tuple[float, float]:
        """The ends of the t interval of the mean; NaN if the units give no error."""
        return self.mean - self.half_width, self.mean + self.half_width

    @property
    def p(self) -> float:
        """Two-sided p value of the paired t test against no difference; NaN if the units give no error."""
        from scipy import stats

        return 2 * float(stats.t.sf(abs(self.mean) / self._error, len(self.values) - 1))

    @property
    def verdict(self) -> Verdict:
        """HIGHER or LOWER if the interval excludes 0 and the correction, if there is one, agrees."""
        verdict = verdict_of(*self.interval)
        claimed = verdict in (Verdict.HIGHER, Verdict.LOWER)
        if claimed and self.adjusted_p is not None and not self.adjusted_p < 1 - LEVEL:
            return Verdict.UNCLEAR
        return verdict

    @property
    def _error(self) -> float:
        """The standard error of the mean; NaN for fewer than two values, or equal ones, which show no spread."""
        if len(self.values) < 2 or not all(map(math.isfinite, self.values)):
            return math.nan
        return statistics.stdev(self.values) / math.sqrt(len(self.values)) or math.nan

    def amount(self, digits: int = 1) -> str:
        """Return the mean and its interval as text: `+1.9 [−0.7, +4.4]`; only the mean if there is no interval."""
        if not self.values:
            return "–"
        low, high = self.interval
        if math.isnan(low):
            return _signed(self.mean, digits)
        return f"{_signed(self.mean, digits)} [{signed(low, digits)}, {signed(high, digits)}]"

    def sentence(self, digits: int = 1) -> str:
        """Return one line: what is compared, the interval, the differences by seed, and whether it is shown."""
        by_seed = ", ".join(_signed(value, digits) for value in self.values)
        return f"{self.name}: {self.amount(digits)} (seeds: {by_seed}): {self.conclusion()}"

    def conclusion(self) -> str:
        """Return whether the difference is shown, in words, with the p value."""
        if self.verdict is Verdict.UNKNOWN:
            reason = "one seed has no interval" if len(self.values) < 2 else "no spread over seeds"
            return f"not judged, {reason}"
        if self.adjusted_p is None:
            p = f"p {_probability(self.p)}"
        else:
            p = f"p {_probability(self.adjusted_p)} after Holm's correction"
        if self.verdict is Verdict.UNCLEAR:
            return f"not shown ({p})"
        return f"shown to be {self.verdict.value} ({p})"


def difference(name: str, a: Mapping[int, float], b: Mapping[int, float]) -> Difference:
    """Return the paired difference of two arms, given by seed; seeds that one of them lacks are left out.

    Differences are rounded to nine digits after the point, since 60.3 - 60.1 and 50.3 - 50.1 differ in the last bits,
    and a spread of rounding errors would claim anything.
    """
    return Difference(name, tuple(round(a[seed] - b[seed], _MOST_DIGITS) for seed in sorted(a.keys() & b.keys())))


def outer_means(values: Mapping[tuple[int, ...], float]) -> dict[int, float]:
    """Average nested trainings within each outermost unit, level by level.

    Args:
        values: one value for each training, by the indices of its units from the outermost to the innermost, as
            (network, codebook, ViT). All keys are equally long.

    Returns:
        the mean of each outermost unit. A unit with more trainings below it counts no more than others.
    """
    groups: dict[int, dict[tuple[int, ...], float]] = {}
    for (outer, *inner), value in values.items():
        groups.setdefault(outer, {})[tuple(inner)] = value
    return {
        outer: statistics.fmean(outer_means(below).values()) if () not in below else below[()]
        for outer, below in groups.items()
    }


def holm(p_values: Sequence[float], size: int = 0) -> list[float]:
    """Return Holm's adjusted p values of a family, in the given order; a NaN is no test and stays NaN.

    `size` is the number of comparisons that the family is to have, if not all are tested yet.
    """
    tested = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, p * (max(size, len(tested)) - rank)))
        adjusted[index] = largest
    return adjusted


def family(differences: Iterable[Difference], size: int = 0) -> list[Difference]:
    """Return differences that are read together, with the correction of their p values; a single one needs none.

    `size` is as in `holm`: otherwise what is shown of half a study would be lost when its other half is finished.
    """
    members = list(differences)
    if max(size, len(members)) < 2:
        return members
    adjusted = holm([member.p for member in members], size)
    return [Difference(member.name, member.values, p) for member, p in zip(members, adjusted, strict=True)]


def mean_and_deviation(values: Sequence[float], digits: int = 1) -> str:
    """Return `mean ± standard deviation` of values over seeds; only the mean for one seed, a dash for none."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def signed(value: float, digits: int = 1, limit: float = 0.0) -> str:
    """Return a number with its sign, and with more digits if rounding would carry it to a limit that it is compared to.

    Otherwise an end of +0.04 stands as `+0.0` beside "shown to be higher", and a lead of 1.96 as `+2.0` beside "less
    than 2 points".
    """
    return _signed(value, _enough_digits(value, limit, digits, "f"))


def _enough_digits(value: float, limit: float, digits: int, style: str) -> int:
    """Return `digits`, or more if `value`, written with them in the format `style`, would be the limit."""
    while value != limit and float(f"{value:.{digits}{style}}") == limit and digits < _MOST_DIGITS:
        digits += 1
    return digits


def _signed(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def _probability(p: float) -> str:
    if p < 0.001:
        return "< 0.001"
    if p >= 0.1:
        return f"{p:.2f}"
    return f"{p:.{_enough_digits(p, round(1 - LEVEL, _MOST_DIGITS), 2, 'g')}g}"
