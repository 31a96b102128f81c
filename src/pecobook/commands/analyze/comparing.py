"""Sections of the report that compare codebooks, and the ViTs pre-trained on them, in pairs.

The text claims nothing that the numbers and their sampling errors do not show. In addition to the contents of
`analysis.json`, `results` holds the measurements of `pecobook demo`, with accuracies in percent:

    {"floor": {"linear", "knn"}, "num_test", "chance", "comparisons": [{"metric", "a", "b", "difference",
     "standard_error"}], "tokenizers": [{..., "mim": {"loss", "accuracy", "accuracy_of_position", "linear", "knn"} or
     null}]}

The page leaves out missing values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pecobook.analysis.charts import Score, score_chart
from pecobook.analysis.comparison import (
    PERCENT_METRICS,
    UNTRAINED,
    Comparison,
    accuracy,
    claim,
    compare,
    deciding_probe,
)
from pecobook.analysis.evidence import Verdict
from pecobook.analysis.probe import MIN_IMAGES, binomial_error
from pecobook.analysis.report import Picture, Section, Table
from pecobook.analysis.wording import accuracy_with_error, fixed

Results = Mapping[str, Any]

ONE_SEED = "one seed; this is an illustration, not a result"

_POSITION_REMOVED = (
    "With position removed, the classifier is trained on the codes of one half of the positions in the image and "
    "tested on the codes of the other half, so a codeword helps only if it means the same at different positions."
)
_ROLES = {
    "pixel": "“pixel” is trained with the pixel loss only",
    "control": "“control” adds a perceptual loss in the features of a network with random weights, so it has the "
    "method without anything that a network has learnt",
    "perceptual": "“perceptual” adds the perceptual loss of the trained network",
}


def summary_of_comparisons(results: Results) -> tuple[str, ...]:
    """Return the main results in a few sentences."""
    lines = [claim(results)]
    plain = compare(results, "codeword_probe", "perceptual", "control")
    if deciding_probe(results) == "crossed_probe" and plain is not None:
        lines.append(
            f"{_POSITION_REMOVED} Codewords that are bound to one position help only the plain probe; in that probe, "
            f"perceptual against control: {plain.words()}."
        )
    against_control = compare(results, "mim.linear", "perceptual", "control")
    if against_control is not None:
        lines.append(
            "Pre-training a vision transformer on these codes, linear probe, perceptual against control: "
            f"{against_control.words()}."
        )
    floors = [(name, compare(results, "mim.linear", name, UNTRAINED)) for name in _names(results)]
    parts = [f"{name} {floor.words()}" for name, floor in floors if floor is not None]
    if parts:
        lines.append("Against the same transformer untrained: " + "; ".join(parts) + ".")
    lines.append(f"All of this comes from {ONE_SEED}.")
    return tuple(lines)


def finding(results: Results) -> str | None:
    """Return which tokenizer's codes say most about classes, if this was shown; None for one tokenizer."""
    names = _names(results)
    crossed = all(accuracy(results, "crossed_probe", name) is not None for name in names)
    metric = "crossed_probe" if crossed else "codeword_probe"
    scores = {name: accuracy(results, metric, name) or 0.0 for name in names}
    ranked = sorted(names, key=lambda name: -scores[name])
    if len(ranked) < 2:
        return None
    first, second = ranked[:2]
    pair = compare({**results, "num_test": _num_test(results)}, metric, first, second)
    probe = "a linear classifier" + (", with position removed," if crossed else "")
    figures = f"{probe} is right in {scores[first]:.1f}% ({first}) and {scores[second]:.1f}% ({second})"
    if pair is not None and pair.verdict is Verdict.HIGHER:
        return f"The codes of {first} tell most about the class of an image: {figures}, higher by {pair.amount}."
    return f"Whether the codes of {first} or of {second} tell more about the class is not shown here: {figures}."


def what_was_compared(results: Results) -> Section:
    """Explain how the codebooks differ."""
    roles = [_ROLES[name] for name in _names(results) if name in _ROLES]
    text = (
        "A codebook turns an image into a grid of codes, like words of a small vocabulary; a decoder "
        "turns the codes back into an image. A vision transformer is then pre-trained by predicting the "
        "codes of masked patches, so it can learn only the information that the codes contain."
    )
    if roles:
        text += "\n\nThe codebooks differ only in the loss that trains them: " + "; ".join(roles) + ". "
    if {"control", "perceptual"} <= set(_names(results)):
        text += (
            "The paper compares perceptual with pixel. The control shows how much of a gain comes from "
            "what the network has learnt: a gain that the control has too cannot come from meaning."
        )
    return Section("What was compared", text)


def probe_comparisons(results: Results) -> Section:
    """Show the chart of probe accuracies and the table of paired differences."""
    chance = _chance(results)
    text = (
        "A linear classifier predicts the class of an image from the mean of the image's codewords only. A high "
        "accuracy means that the codewords contain much information about the class."
    )
    if chance is not None:
        text += f" The accuracy of guessing is {chance:.1f}%."
    if any(accuracy(results, "crossed_probe", name) is not None for name in _names(results)):
        text += (
            f"\n\n{_POSITION_REMOVED} In the other two probes of codes, codewords that are bound to one position help."
        )
    caption = (
        "Accuracy on test images with one standard error of sampling to each side. Two accuracies on the "
        "same images are compared in pairs, which shows more than whether their bars overlap."
    )
    charts = _chart_picture(results, caption, tuple(PERCENT_METRICS))
    return Section("Probe accuracy of the codebooks", text, charts, _comparison_table(results))


def probe_chart(results: Results, metrics: Collection[str] = tuple(PERCENT_METRICS)) -> bytes | None:
    """Draw the accuracies of probes with sampling errors; None if the number of test images is unknown or small."""
    number, accuracies = _num_test(results), _accuracies(results, metrics)
    if not accuracies or not number or number < MIN_IMAGES:
        return None
    panels = {
        title: [Score(name, value, binomial_error(value, number)) for name, value in by_name.items()]
        for title, by_name in accuracies.items()
    }
    return score_chart(panels, chance=_chance(results))


def leading_chart(results: Results) -> tuple[Picture, ...]:
    """Return the chart of the deciding probe, and of the plain probes if no other section shows them."""
    metrics = [deciding_probe(results)] if "comparisons" in results else ["crossed_probe", "codeword_probe"]
    return _chart_picture(
        results, "Accuracy on held-out images, with one standard error of sampling to each side.", metrics
    )


def _chart_picture(results: Results, caption: str, metrics: Collection[str]) -> tuple[Picture, ...]:
    """Return the chart of the probes, with its numbers as text; nothing if `probe_chart` draws none."""
    chart = probe_chart(results, metrics)
    parts = [
        f"{title}: {', '.join(f'{name} {value:.1f}%' for name, value in by_name.items())}"
        for title, by_name in _accuracies(results, metrics).items()
    ]
    return () if chart is None else (Picture(chart, caption, f"Chart of probe accuracies: {'; '.join(parts)}."),)


def _accuracies(results: Results, metrics: Collection[str]) -> dict[str, dict[str, float]]:
    """Return the measured accuracies by name, by the title of the metric, in the order of `PERCENT_METRICS`."""
    accuracies: dict[str, dict[str, float]] = {}
    for metric, title in PERCENT_METRICS.items():
        if metric not in metrics:
            continue
        for name in (*_names(results), UNTRAINED):
            value = accuracy(results, metric, name)
            if value is not None:
                accuracies.setdefault(title, {})[name] = value
    return accuracies


def comparisons(results: Results) -> list[Comparison]:
    """Return all comparisons of the page: perceptual with the other codebooks, and each ViT with the untrained one."""
    names = _names(results)
    pairs = [("perceptual", name) for name in ("control", "pixel", *names) if name != "perceptual"]
    pairs = list(dict.fromkeys(pairs)) + [(name, UNTRAINED) for name in names]
    candidates = [compare(results, metric, a, b) for metric in PERCENT_METRICS for a, b in pairs]
    return [comparison for comparison in candidates if comparison is not None]


def _comparison_table(results: Results) -> Table | None:
    pairs = comparisons(results)
    if not pairs:
        return None
    conclusions = {Verdict.UNCLEAR: "not shown", Verdict.UNKNOWN: "cannot be judged"}
    rows: list[tuple[str, str, str]] = []
    for pair in pairs:
        heading = (PERCENT_METRICS[pair.metric], "", "")
        rows += [heading] if heading not in rows else []
        conclusion = conclusions.get(pair.verdict, pair.verdict.value)
        rows.append((f"{pair.a} − {pair.b}", pair.signed, conclusion))
    note = (
        "Differences in percentage points ± their standard error. A difference is called “higher” or “lower” only "
        "beyond two standard errors; “not shown” means that this test shows no difference, not that there is none."
    )
    if len(pairs) > 2:
        note += f" Of {len(pairs)} comparisons, about one in twenty exceeds two standard errors by chance alone."
    if not all(pair.paired for pair in pairs):
        note += " Without a paired error, the accuracies are treated as independent, which is cautious."
    return Table(("Comparison", "Points", "Conclusion"), tuple(rows), note, text_columns=(0, 2))


def pretrained_vits(results: Results) -> Section | None:
    """Compare the pre-trained transformers with an untrained one; None if no transformer was probed."""
    models = {tokenizer["name"]: tokenizer.get("mim") for tokenizer in results.get("tokenizers") or ()}
    if not any(models.values()):
        return None
    models[UNTRAINED] = results.get("floor")
    rows = tuple(
        (
            str(name),
            fixed(scores.get("loss"), 2),
            fixed(scores.get("accuracy"), 1),
            fixed(scores.get("accuracy_of_position"), 1),
            *(accuracy_with_error(scores.get(key), results.get("num_test")) for key in ("linear", "knn")),
        )
        for name, scores in models.items()
        if scores
    )
    text = (
        "The transformer receives an image with masked patches and predicts their codes. Its features are "
        "evaluated without fine-tuning, by a linear classifier and a nearest-neighbour vote on the frozen "
        "features, and compared with the features of the same transformer untrained."
    )
    note = (
        "Loss and code accuracy cannot be compared between rows: each model predicts the codes of its own "
        "codebook, and some codes are easier to predict without being better. What exceeds "
        "the accuracy of the commonest code of the position was read from the image. Linear and k-NN are "
        "accuracies on test images."
    )
    header = (
        "Trained on codes of",
        "Loss",
        "Code accuracy, %",
        "Commonest code of the position, %",
        "Linear, %",
        "k-NN, %",
    )
    return Section("Pre-trained transformers", text, table=Table(header, rows, note))


def how_to_read() -> Section:
    """Explain what the errors on the page do not include."""
    text = (
        "The standard errors contain one source of randomness only: the choice of the test images. "
        "They do not contain the seed, which determines the initial weights and the order of the images and can "
        f"change an accuracy by more than the bars show. This page comes from {ONE_SEED}.\n\n"
        "The networks here are small and trained for few steps. The paper trains for hundreds of epochs "
        "on ImageNet; this page neither confirms nor refutes the paper's numbers."
    )
    return Section("How to read this page", text)


def _names(results: Results) -> list[str]:
    return [str(tokenizer.get("name", "?")) for tokenizer in results.get("tokenizers") or ()]


def _num_test(results: Results) -> int | None:
    """Return the number of held-out images, which `analyze` stores for each tokenizer."""
    counts = [int(tokenizer.get("num_images", 0)) for tokenizer in results.get("tokenizers") or ()]
    return results.get("num_test") or min(counts, default=None)


def _chance(results: Results) -> float | None:
    if results.get("chance") is not None:
        return float(results["chance"])
    return 100 / results["num_classes"] if results.get("num_classes") else None
