"""Which word a measured difference deserves: higher, lower, or none.

A difference between two accuracies is called higher (or lower) only beyond two standard errors of sampling.
In all other cases the words say that the test shows none, which is not the same as there being none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pecobook.analysis.probe import binomial_error

FEWEST_IMAGES = 100
"""With fewer test images than this the standard error itself is too unsure to judge by."""

PERCENT_METRICS = {
    "codeword_probe": "Linear probe on codewords",
    "bag_probe": "Linear probe on code counts",
    "mim.linear": "Linear probe of the masked model",
    "mim.knn": "k-NN of the masked model",
}
"""Metrics that are accuracies on the same labelled test images, and what a reader calls them.

The masked model's own accuracy is not among them: each model guesses another codebook's codes.
"""

UNTRAINED = "untrained"
"""Name of the floor: the same vision transformer without any training."""


class Verdict(Enum):
    """What a difference a - b allows one to say."""

    HIGHER = "higher"
    LOWER = "lower"
    UNCLEAR = "unclear"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Comparison:
    """Accuracy of `a` minus accuracy of `b`, percent points."""

    metric: str
    a: str
    b: str
    difference: float
    standard_error: float | None
    """None where the sampling error is not known."""
    paired: bool
    """Whether the error is that of pairs on the same images; otherwise it is larger than it had to be."""
    num_test: int | None = None

    @property
    def verdict(self) -> Verdict:
        """HIGHER or LOWER beyond two standard errors, UNKNOWN without a usable error, else UNCLEAR."""
        error = self.standard_error
        few = self.num_test is not None and self.num_test < FEWEST_IMAGES
        if few or error is None or not math.isfinite(self.difference):
            return Verdict.UNKNOWN
        if not math.isfinite(error) or error < 0 or (error == 0 and self.difference != 0):
            return Verdict.UNKNOWN
        if abs(self.difference) > 2 * error:
            return Verdict.HIGHER if self.difference > 0 else Verdict.LOWER
        return Verdict.UNCLEAR

    @property
    def amount(self) -> str:
        """The size of the difference as text, without its sign: `5.9 ± 0.6 points`."""
        return f"{_one(abs(self.difference))} ± {_one(self.standard_error or 0.0)} points"

    @property
    def signed(self) -> str:
        """Difference and standard error as text: `−0.3 ± 0.5`, with a question mark for an unknown error."""
        error = "?" if self.standard_error is None else _one(self.standard_error)
        return f"{round(self.difference, 1) + 0.0:+.1f} ± {error}".replace("-", "−")

    def words(self) -> str:
        """The verdict with its figures, to stand behind "against b:"."""
        if self.verdict is Verdict.UNKNOWN:
            if self.num_test is not None and self.num_test < FEWEST_IMAGES:
                return f"cannot be judged, {self.num_test} test images are too few"
            return "cannot be judged, its sampling error is not known"
        if self.verdict is Verdict.UNCLEAR:
            return f"no difference that this test can show ({self.signed} points)"
        return f"{self.verdict.value} by {self.amount}"


def compare(results: Mapping[str, Any], metric: str, a: str, b: str) -> Comparison | None:
    """Difference a - b on `metric`, from `results["comparisons"]` or else from the two accuracies.

    The second way treats the two as measured on different test images, so its error is
    rather too large than too small. None where one of the two has no such accuracy.
    """
    num_test = results.get("num_test")
    for entry in results.get("comparisons") or ():
        for first, second, sign in ((a, b, 1.0), (b, a, -1.0)):
            names = tuple(UNTRAINED if entry.get(side) == "floor" else entry.get(side) for side in "ab")
            if entry.get("metric") == metric and names == (first, second):
                error = entry.get("standard_error")
                return Comparison(metric, a, b, sign * float(entry["difference"]), error, True, num_test)
    x, y = accuracy(results, metric, a), accuracy(results, metric, b)
    if x is None or y is None:
        return None
    error = math.hypot(binomial_error(x, num_test), binomial_error(y, num_test)) if num_test else None
    return Comparison(metric, a, b, x - y, error, False, num_test)


def accuracy(results: Mapping[str, Any], metric: str, name: str) -> float | None:
    """Percent that codebook `name` reaches on `metric`, where a dot goes a level down.

    `untrained` is the floor of the masked model's probes. None where it was not measured.
    """
    place: Any = next((one for one in results.get("tokenizers") or () if one.get("name") == name), None)
    if place is None and name == UNTRAINED:
        place = {"mim": results.get("floor")}
    for key in metric.split("."):
        place = place.get(key) if isinstance(place, Mapping) else None
    return float(place) if isinstance(place, (int, float)) and math.isfinite(place) else None


def claim(results: Mapping[str, Any]) -> str:
    """What this run says about the paper's claim, that perceptual codewords are more semantic.

    The claim is about perceptual against pixel. It rests here on the control as well: the same perceptual
    network with random weights, which shares all of the method except what the network has learnt.
    """
    control = compare(results, "codeword_probe", "perceptual", "control")
    pixel = compare(results, "codeword_probe", "perceptual", "pixel")
    if control is None:
        return (
            "This run has no control (the same perceptual network with random weights) beside a "
            "perceptual codebook, so it cannot say whether perceptual codewords are more semantic."
        )
    mine = "The linear probe on perceptual codewords is"
    verdict = control.verdict
    if verdict is Verdict.UNKNOWN:
        return f"Whether perceptual codewords are more semantic than the control's {control.words()}."
    if verdict is Verdict.LOWER:
        return (
            f"{mine} lower than the control's, by {control.amount}: at this size, the run speaks against "
            "the paper's claim."
        )
    if verdict is Verdict.UNCLEAR:
        return _claim_without_control(control, pixel)
    if pixel is None:
        return (
            f"{mine} higher than the control's (same network, random weights), by {control.amount}; "
            "without a pixel codebook the paper's claim itself is not tested."
        )
    if pixel.verdict is Verdict.HIGHER:
        return (
            f"{mine} higher than the control's (same network, random weights), by {control.amount}, and "
            f"higher than the pixel codebook's, by {pixel.amount}: the direction that the paper claims."
        )
    against = pixel.words() if pixel.verdict is not Verdict.LOWER else f"it is lower, by {pixel.amount}"
    return (
        f"{mine} higher than the control's (same network, random weights), by {control.amount}, but "
        f"against the pixel codebook: {against}. The paper's claim is not shown here."
    )


def _claim_without_control(control: Comparison, pixel: Comparison | None) -> str:
    if pixel is not None and pixel.verdict is Verdict.HIGHER:
        return (
            "The linear probe on perceptual codewords is higher than the pixel codebook's, by "
            f"{pixel.amount}, but against the control: {control.words()}. The gain can therefore not be "
            "called semantic."
        )
    text = f"Perceptual codewords against the control's: {control.words()}. "
    if pixel is not None:
        text += f"Against the pixel codebook's: {pixel.words()}. "
    return text + "This run does not show the paper's claim."


def _one(value: float) -> str:
    return "under 0.1" if 0 < value < 0.05 else f"{value:.1f}"
