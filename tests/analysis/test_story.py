"""The words of the demo's report claim nothing that its figures do not show."""

import re
from pathlib import Path
from typing import Any

import pytest

from pecobook.analysis.comparison import Comparison, Verdict, claim, compare
from pecobook.analysis.report import Report, render, write_report
from pecobook.analysis.story import ONE_SEED, comparisons, demo_report, probe_chart
from pecobook.analysis.wording import duration

from .test_report import EVIL, png, read

Number = float | None


def results(
    pixel: Number = 27.0,
    control: Number = 28.0,
    perceptual: Number = 34.0,
    *,
    num_test: int | None = 10_000,
    **more: Any,
) -> dict[str, Any]:
    probes = {"pixel": pixel, "control": control, "perceptual": perceptual}
    books = [
        {
            "name": name, "codes_used": 400, "perplexity": 250.0, "psnr": 19.0, "perceptual_distance": 0.5,
            "codeword_probe": probe, "mim": {"loss": 5.0, "accuracy": 10.0, "linear": probe + 7, "knn": probe},
        }
        for name, probe in probes.items()
        if probe is not None
    ]  # fmt: skip
    floor = {"linear": 33.0, "knn": 27.0}
    return {
        "data": "photos", "seed": 0, "seconds": 400.0, "floor": floor, "codebooks": books, "num_test": num_test,
        "num_classes": 10, **more,
    }  # fmt: skip


def said(report: Report) -> str:
    """All prose of a report, as a reader sees it."""
    return " ".join(" ".join(read(render(report)).text).replace("\u00a0", " ").replace("’", "'").split())


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


def test_few_test_images_judge_nothing() -> None:
    comparison = Comparison("codeword_probe", "perceptual", "control", 30.0, 5.0, True, 40)
    assert comparison.words() == "cannot be judged, 40 test images are too few"


@pytest.mark.parametrize(
    ("pixel", "control", "perceptual", "contains", "never"),
    [
        (27, 28, 34, "the direction that the paper claims", "no difference"),
        (27, 33.8, 34, "The gain can therefore not be called semantic", "direction that the paper claims"),
        (33.9, 33.8, 34, "This run does not show the paper's claim", "semantic"),
        (36, 33.8, 34, "Against the pixel codebook's: lower by 2.0", "higher"),
        (27, 40, 34, "speaks against the paper's claim", "higher"),
        (34, 28, 34, "The paper's claim is not shown here", "direction"),
        (40, 28, 34, "it is lower, by 6.0", "direction"),
        (None, 28, 34, "without a pixel codebook the paper's claim itself is not tested", "direction"),
        (27, None, 34, "This run has no control", "higher"),
        (27, 28, None, "This run has no control", "higher"),
    ],
)
def test_the_claim_rests_on_the_control(
    pixel: Number, control: Number, perceptual: Number, contains: str, never: str
) -> None:
    text = claim(results(pixel, control, perceptual))
    assert contains in text
    assert never not in text
    assert demo_report(results(pixel, control, perceptual), {}, [], {}).summary[0] == text


def test_without_the_number_of_test_images_nothing_is_claimed() -> None:
    data = results(num_test=None)
    assert "cannot be judged" in claim(data)
    assert probe_chart(data) is None
    words = said(demo_report(data, {}, [], {}))
    assert "higher by" not in words
    assert "± ?" in words


def test_recorded_comparisons_win_and_may_stand_in_either_direction() -> None:
    entry = {
        "metric": "codeword_probe",
        "a": "control",
        "b": "perceptual",
        "difference": -0.4,
        "standard_error": 0.3,
    }
    data = results(comparisons=[entry])
    found = compare(data, "codeword_probe", "perceptual", "control")
    assert found is not None
    assert (found.difference, found.standard_error, found.paired) == (0.4, 0.3, True)
    assert "can therefore not be called semantic" in claim(data)
    floor = {"metric": "mim.linear", "a": "pixel", "b": "floor", "difference": 9.0, "standard_error": 0.3}
    against = compare(results(comparisons=[floor]), "mim.linear", "pixel", "untrained")
    assert against is not None
    assert against.difference == 9.0


def test_unpaired_error_is_that_of_two_independent_samples() -> None:
    found = compare(results(20.0, 50.0, 50.0, num_test=400), "codeword_probe", "perceptual", "pixel")
    assert found is not None
    assert found.standard_error == pytest.approx((2.5**2 + 2.0**2) ** 0.5)


def test_the_page_says_that_one_seed_is_an_illustration() -> None:
    words = said(demo_report(results(), {}, [], {}))
    assert words.count(ONE_SEED) >= 2
    assert "with random weights" in words


def test_words_of_rank_never_stand_beside_figures_without_an_error() -> None:
    report = demo_report(results(), {}, [("codebook", 61.0)], {"seed": 0})
    prose = [*report.summary, *(paragraph for section in report.sections for paragraph in section.paragraphs)]
    for sentence in re.split(r"(?<=[.:;]) ", " ".join(prose)):
        if re.search(r"\b(higher|lower|better than|best|worse than|outperform\w*|improve\w*)\b", sentence):
            assert "±" in sentence, sentence


def test_every_part_of_a_full_report_is_there(tmp_path: Path) -> None:
    pictures = {name: png() for name in ("reconstructions", "masked_prediction", "usage", "gallery:pixel", "extra_one")}
    logged = [{"step": i, "loss": 1.0 / (i + 1)} for i in range(5)]
    report = demo_report(
        results(),
        pictures,
        [("codebook", 61.0), ("probe", 30.0)],
        {"seed": 0},
        {"codebook": {"pixel": logged}},
    )
    titles = [section.title for section in report.sections]
    assert len(titles) == 9
    assert len([picture for section in report.sections for picture in section.pictures]) == 7
    assert len(comparisons(results())) == 2 + 2 * 5
    assert write_report(tmp_path, report).stat().st_size < 10_000_000


def test_missing_parts_are_left_out() -> None:
    bare = {"codebooks": [{"name": "pixel", "psnr": None, "codeword_probe": 30.0, "mim": None}]}
    report = demo_report(bare, {}, [], {})
    assert report.title == "One codebook, the same images"
    assert "Behind the mask" not in [section.title for section in report.sections]
    assert "–" in said(report)
    render(demo_report({}, {}, [], {}))


def test_names_from_outside_are_escaped() -> None:
    data = results(data=EVIL)
    data["codebooks"][0]["name"] = EVIL
    report = demo_report(data, {f"gallery:{EVIL}": png(), EVIL: png()}, [(EVIL, 3.0)], {EVIL: EVIL})
    assert "script" not in read(render(report)).tags


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "1 min 30 s"), (120, "2 min"), (5400, "1 h 30 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
