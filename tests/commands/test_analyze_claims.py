"""The text of the page claims only what the numbers show."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pecobook.analysis.comparison import Comparison, claim, compare
from pecobook.analysis.evidence import Verdict
from pecobook.analysis.wording import accuracy_with_error
from pecobook.commands.analyze.comparing import ONE_SEED, probe_chart
from pecobook.commands.analyze.page import compose
from pecobook.commands.analyze.tables import with_error
from tests.commands.test_analyze_page import Number, distinct, results, text_of


@pytest.mark.parametrize(
    ("difference", "error", "verdict", "words"),
    [
        (5.9, 0.6, Verdict.HIGHER, "higher by 5.9 ± 0.6 points"),
        (-5.9, 0.6, Verdict.LOWER, "lower by 5.9 ± 0.6 points"),
        (1.0, 0.5, Verdict.UNCLEAR, "no difference that this test can show (+1.0 ± 0.5 points)"),
        (1.001, 0.5, Verdict.HIGHER, "higher by 1.0 ± 0.5 points"),
        (-0.3, 0.5, Verdict.UNCLEAR, "no difference that this test can show (−0.3 ± 0.5 points)"),
        (-0.01, 0.5, Verdict.UNCLEAR, "no difference that this test can show (+0.0 ± 0.5 points)"),
        (0.0, 0.0, Verdict.UNCLEAR, "no difference that this test can show (+0.0 ± 0.0 points)"),
        (0.2, 0.03, Verdict.HIGHER, "higher by 0.2 ± under 0.1 points"),
        (9.0, None, Verdict.UNKNOWN, "cannot be judged, its sampling error is not known"),
        (9.0, 0.0, Verdict.UNKNOWN, "cannot be judged, its sampling error is not known"),
        (9.0, float("nan"), Verdict.UNKNOWN, "cannot be judged, its sampling error is not known"),
        (float("nan"), 0.5, Verdict.UNKNOWN, "cannot be judged, its sampling error is not known"),
    ],
)
def test_a_difference_is_called_higher_only_beyond_two_standard_errors(
    difference: float, error: float | None, verdict: Verdict, words: str
) -> None:
    comparison = Comparison("codeword_probe", "perceptual", "control", difference, error, True, 10_000)
    assert comparison.verdict is verdict
    assert comparison.words() == words


def test_few_test_images_give_counts_and_no_errors() -> None:
    assert accuracy_with_error(100.0, 4) == "4 of 4"
    assert accuracy_with_error(0.0, 19) == "0 of 19"
    assert accuracy_with_error(50.0, 20) == "50.0 ± 10.9"
    few = Comparison("mim.knn", "a", "b", 0.0, 16.7, True, 4)
    assert few.signed == "–"
    assert few.words() == "cannot be judged, 4 test images are too few"
    cell = with_error("codeword_probe")
    assert cell({"codeword_probe": 100.0, "codeword_probe_error": None}) == "too few images"
    assert cell({}) == "–"


def test_few_test_images_allow_no_verdict() -> None:
    comparison = Comparison("codeword_probe", "perceptual", "control", 30.0, 5.0, True, 40)
    assert comparison.words() == "cannot be judged, 40 test images are too few"


@pytest.mark.parametrize(
    ("pixel", "control", "perceptual", "contains", "never"),
    [
        (27, 28, 34, "the direction that the paper claims", "no difference"),
        (27, 33.8, 34, "The gain can therefore not be called semantic", "direction that the paper claims"),
        (33.9, 33.8, 34, "This run does not show the paper's claim", "semantic"),
        (36, 33.8, 34, "Against the pixel codebook's: lower by 2.0", "higher"),
        (27, 40, 34, "contradicts the paper's claim", "higher"),
        (34, 28, 34, "The paper's claim is not shown here", "direction"),
        (40, 28, 34, "it is lower, by 6.0", "direction"),
        (None, 28, 34, "without a pixel codebook the paper's claim itself is not tested", "direction"),
        (27, None, 34, "This run has no control", "higher"),
        (27, 28, None, "This run has no control", "higher"),
    ],
)
def test_the_claim_depends_on_the_control(
    pixel: Number, control: Number, perceptual: Number, contains: str, never: str
) -> None:
    text = claim(results(pixel, control, perceptual))
    assert contains in text
    assert never not in text
    assert compose(results(pixel, control, perceptual), {}, [], {}).summary[0] == text


@pytest.mark.parametrize(
    ("crossed", "contains", "never"),
    [
        ((20, 20, 30), "with position removed, is higher than the control's", "not shown"),
        ((20, 29.5, 30), "The gain can therefore not be called semantic", "direction"),
        ((29.5, 29.6, 30), "with position removed, compared with the control's: no difference", "direction"),
        ((20, 35, 30), "with position removed, is lower than the control's", "direction"),
    ],
)
def test_the_claim_is_decided_by_the_probe_with_position_removed(
    crossed: tuple[float, ...], contains: str, never: str
) -> None:
    data = results(27, 28, 34)  # the plain probe would show the claim
    for tokenizer, accuracy in zip(data["tokenizers"], crossed, strict=True):
        tokenizer["crossed_probe"] = accuracy
    assert contains in claim(data)
    assert never not in claim(data)
    first, second, *_ = compose(data, {}, [], {}).summary
    assert first == claim(data)
    assert "trained on the codes of one half of the positions" in second
    assert "help only the plain probe" in second
    assert "perceptual against control: higher by 6.0 ± 0.7 points" in second
    assert text_of(compose(data, {}, [], {})).count("With position removed, the classifier is trained") == 2
    test_no_sentence_ranks_results_without_an_error(data)


def test_without_the_number_of_test_images_nothing_is_claimed() -> None:
    data = results(num_test=None)
    assert "cannot be judged" in claim(data)
    assert probe_chart(data) is None
    words = text_of(compose(data, {}, [], {}))
    assert "higher by" not in words
    assert "± ?" in words


def test_recorded_comparisons_take_precedence_in_either_direction() -> None:
    entry = {
        "metric": "codeword_probe",
        "a": "control",
        "b": "perceptual",
        "difference": -0.4,
        "standard_error": 0.3,
    }
    data = results(comparisons=[entry])
    comparison = compare(data, "codeword_probe", "perceptual", "control")
    assert comparison is not None
    assert (comparison.difference, comparison.standard_error, comparison.paired) == (0.4, 0.3, True)
    assert "can therefore not be called semantic" in claim(data)
    floor = {"metric": "mim.linear", "a": "pixel", "b": "floor", "difference": 9.0, "standard_error": 0.3}
    against = compare(results(comparisons=[floor]), "mim.linear", "pixel", "untrained")
    assert against is not None
    assert against.difference == 9.0


def test_unpaired_error_is_that_of_two_independent_samples() -> None:
    comparison = compare(results(20.0, 50.0, 50.0, num_test=400), "codeword_probe", "perceptual", "pixel")
    assert comparison is not None
    assert comparison.standard_error == pytest.approx((2.5**2 + 2.0**2) ** 0.5, rel=2e-3)


def test_the_page_says_that_one_seed_is_an_illustration() -> None:
    words = text_of(compose(results(), {}, [], {}))
    assert words.count(ONE_SEED) >= 2
    assert "with random weights" in words


@pytest.mark.parametrize("data", [results(), distinct()])
def test_no_sentence_ranks_results_without_an_error(data: dict[str, Any]) -> None:
    report = compose(data, {}, [("codebook", 61.0)], {"seed": 0})
    prose = [*report.summary, *(paragraph for section in report.sections for paragraph in section.paragraphs)]
    for sentence in re.split(r"(?<=[.:;]) ", " ".join(prose)):
        if re.search(r"\b(higher|lower|better than|best|worse than|outperform\w*|improve\w*)\b", sentence):
            assert "±" in sentence, sentence
