"""Paired comparison of two accuracies, and the words that the report uses for the difference.

The report calls an accuracy higher (or lower) only if the difference exceeds two standard errors of sampling. In all
other cases the report says that the test shows no difference, which does not mean that there is no difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pecobook.analysis.evidence import Verdict, verdict_of
from pecobook.analysis.probe import MIN_IMAGES, binomial_error
from pecobook.utils.json_files import is_number

MIN_TEST_IMAGES = 100
"""Minimum number of test images for a verdict; with fewer images the standard error is too uncertain."""

PERCENT_METRICS = {
    "codeword_probe": "Linear probe on codewords",
    "crossed_probe": "Linear probe on codewords, position removed",
    "bag_probe": "Linear probe on code counts",
    "mim.linear": "Linear probe of the masked model",
    "mim.knn": "k-NN of the masked model",
}
"""Titles of the metrics that are accuracies on the same labelled test images.

The accuracy of masked prediction is not one of these metrics, because each model predicts other codes.
"""

UNTRAINED = "untrained"
"""Name of the baseline (`floor` in the results): the same vision transformer without any training."""


@dataclass(frozen=True)
class Comparison:
    """The accuracy of `a` minus the accuracy of `b`, in percentage points."""

    metric: str
    a: str
    b: str
    difference: float
    standard_error: float | None
    """None if the sampling error is unknown."""
    paired: bool
    """Whether the error is computed from pairs on the same images; an unpaired error is larger than necessary."""
    num_test: int | None = None

    @property
    def verdict(self) -> Verdict:
        """HIGHER or LOWER beyond two standard errors, UNKNOWN without a usable error, else UNCLEAR."""
        error = self.standard_error
        if self._too_few_images or error is None or not math.isfinite(self.difference):
            return Verdict.UNKNOWN
        if not math.isfinite(error) or error < 0 or (error == 0 and self.difference != 0):
            return Verdict.UNKNOWN
        return verdict_of(self.difference - 2 * error, self.difference + 2 * error)

    @property
    def _too_few_images(self) -> bool:
        return self.num_test is not None and self.num_test < MIN_TEST_IMAGES

    @property
    def amount(self) -> str:
        """The size of the difference as text, without the sign: `5.9 ± 0.6 points`."""
        return f"{_one_decimal(abs(self.difference))} ± {_one_decimal(self.standard_error or 0.0)} points"

    @property
    def signed(self) -> str:
        """Difference and standard error as text: `−0.3 ± 0.5`, with a question mark for an unknown error.

        A dash stands for a difference on fewer than `MIN_IMAGES` test images.
        """
        if self.num_test is not None and self.num_test < MIN_IMAGES:
            return "–"
        error = "?" if self.standard_error is None else _one_decimal(self.standard_error)
        return f"{round(self.difference, 1) + 0.0:+.1f} ± {error}".replace("-", "−")

    def words(self) -> str:
        """Return the verdict with the numbers, as text that follows "against b:"."""
        if self.verdict is Verdict.UNKNOWN:
            if self._too_few_images:
                return f"cannot be judged, {self.num_test} test images are too few"
            return "cannot be judged, its sampling error is not known"
        if self.verdict is Verdict.UNCLEAR:
            return f"no difference that this test can show ({self.signed} points)"
        return f"{self.verdict.value} by {self.amount}"


def compare(results: Mapping[str, Any], metric: str, a: str, b: str) -> Comparison | None:
    """Return the difference a - b on `metric`, from `results["comparisons"]` or else from the two accuracies.

    The error of the difference of two accuracies is computed as if the test images differed, so the error is rather too
    large than too small. Returns None if `a` or `b` has no such accuracy.
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
    """Return the accuracy of codebook `name` on `metric` in percent, or None if the accuracy was not measured.

    A dot in `metric` separates nested keys. The name `untrained` is the baseline of the probes of the masked model.
    """
    tokenizers = results.get("tokenizers") or ()
    value: Any = next((tokenizer for tokenizer in tokenizers if tokenizer.get("name") == name), None)
    if value is None and name == UNTRAINED:
        value = {"mim": results.get("floor")}
    value = lookup(value, *metric.split("."))
    return float(value) if is_number(value) else None


def lookup(value: Any, *keys: str) -> Any:
    """Return the value under nested keys of a mapping, or None if a key is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def claim(results: Mapping[str, Any]) -> str:
    """Return what this run shows about the paper's claim that perceptual codewords are more semantic.

    The paper's claim compares perceptual with pixel codewords. Here the claim also has to hold against the control: the
    same perceptual network with random weights, so the same method without what the network has learnt. The probe with
    position removed decides (`deciding_probe`), because the plain probe also rewards codes that are tied to a position.
    """
    metric = deciding_probe(results)
    control, pixel = (compare(results, metric, "perceptual", name) for name in ("control", "pixel"))
    if control is None:
        return (
            "This run has no control (the same perceptual network with random weights) to compare with a "
            "perceptual codebook, so it cannot show whether perceptual codewords are more semantic."
        )
    probe = "The linear probe on perceptual codewords"
    probe += ", with position removed," if metric == "crossed_probe" else ""
    if control.verdict is Verdict.UNKNOWN:
        return f"Whether perceptual codewords are more semantic than the control's {control.words()}."
    if control.verdict is Verdict.LOWER:
        return (
            f"{probe} is lower than the control's, by {control.amount}: at this size, the run contradicts "
            "the paper's claim."
        )
    if control.verdict is Verdict.UNCLEAR:
        return _no_claim_against_control(probe, control, pixel)
    higher = f"{probe} is higher than the control's (same network, random weights), by {control.amount}"
    if pixel is None:
        return f"{higher}; without a pixel codebook the paper's claim itself is not tested."
    if pixel.verdict is Verdict.HIGHER:
        return (
            f"{higher}, and higher than the pixel codebook's, by {pixel.amount}: the direction that the paper claims."
        )
    against = f"it is lower, by {pixel.amount}" if pixel.verdict is Verdict.LOWER else pixel.words()
    return f"{higher}, but against the pixel codebook: {against}. The paper's claim is not shown here."


def deciding_probe(results: Mapping[str, Any]) -> str:
    """Return the metric that decides about the claim: the probe with position removed, if it was measured."""
    crossed = compare(results, "crossed_probe", "perceptual", "control")
    return "codeword_probe" if crossed is None else "crossed_probe"


def _no_claim_against_control(probe: str, control: Comparison, pixel: Comparison | None) -> str:
    if pixel is not None and pixel.verdict is Verdict.HIGHER:
        return (
            f"{probe} is higher than the pixel codebook's, by {pixel.amount}, but against the control: "
            f"{control.words()}. The gain can therefore not be called semantic."
        )
    text = f"{probe} compared with the control's: {control.words()}. "
    if pixel is not None:
        text += f"Against the pixel codebook's: {pixel.words()}. "
    return text + "This run does not show the paper's claim."


def _one_decimal(value: float) -> str:
    return "under 0.1" if 0 < value < 0.05 else f"{value:.1f}"
