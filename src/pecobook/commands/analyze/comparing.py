"""Sections of the report that compare codebooks in pairs, and the ViTs pre-trained on them.

They claim nothing that the figures and their sampling errors do not show. Beside what `analysis.json` holds, `results`
has what `pecobook demo` measures, with accuracies in percent:

    {"floor": {"linear", "knn"}, "num_test", "chance", "comparisons": [{"metric", "a", "b", "difference",
     "standard_error"}], "tokenizers": [{..., "mim": {"loss", "accuracy", "linear", "knn"} or null}]}

Whatever is missing is left out of the page.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pecobook.analysis.charts import Score, score_chart
from pecobook.analysis.comparison import (
    PERCENT_METRICS,
    UNTRAINED,
    Comparison,
    Verdict,
    accuracy,
    claim,
    compare,
)
from pecobook.analysis.probe import binomial_error
from pecobook.analysis.report import Picture, Section, Table
from pecobook.analysis.wording import fixed, with_error

Results = Mapping[str, Any]

ONE_SEED = "one seed; this is an illustration, not a result"

_ROLES = {
    "pixel": "“pixel” is trained on the error of its pixels alone",
    "control": "“control” adds a perceptual network with random weights, so it has the method but no knowledge",
    "perceptual": "“perceptual” adds the same network after training",
}


def summary_of_comparisons(results: Results) -> tuple[str, ...]:
    """What a reader in a hurry takes away."""
    lines = [claim(results)]
    against_control = compare(results, "mim.linear", "perceptual", "control")
    if against_control is not None:
        lines.append(
            "Pre-training a vision transformer on these codes, linear probe, perceptual against control: "
            f"{against_control.words()}."
        )
    trained = [_against_floor(results, name) for name in _names(results)]
    known = [part for part in trained if part]
    if known:
        lines.append("Against the same transformer untrained: " + "; ".join(known) + ".")
    lines.append(f"All of this comes from {ONE_SEED}.")
    return tuple(lines)


def _against_floor(results: Results, name: str) -> str:
    floor = compare(results, "mim.linear", name, UNTRAINED)
    return f"{name} {floor.words()}" if floor is not None else ""


def what_was_compared(results: Results) -> Section:
    """How the codebooks differ."""
    roles = [_ROLES[name] for name in _names(results) if name in _ROLES]
    text = (
        "A codebook turns an image into a grid of codes, like words of a small vocabulary; a decoder "
        "turns the codes back into an image. A vision transformer is then pre-trained by guessing the "
        "codes of hidden patches, so it can learn from them only what the codes hold."
    )
    if roles:
        text += "\n\nThe codebooks here differ in one thing, what they are trained to keep: " + "; ".join(roles) + ". "
    if {"control", "perceptual"} <= set(_names(results)):
        text += (
            "The paper compares perceptual with pixel. The control tells how much of a gain comes from "
            "what the network has learnt: what the control gains as well cannot be put down to meaning."
        )
    return Section("What was compared", text)


def probe_comparisons(results: Results) -> Section:
    """The chart of probes and the table of paired differences."""
    chance = _chance(results)
    text = (
        "A linear classifier sees nothing of an image but the mean of its codewords and has to name the "
        "class. The more it gets right, the more of the class the codewords hold."
    )
    if chance is not None:
        text += f" Guessing gives {chance:.1f}%."
    chart = probe_chart(results)
    shown: tuple[Picture, ...] = ()
    if chart is not None:
        caption = (
            "Accuracy on test images with one standard error of sampling to each side. Two scores on the "
            "same images are compared in pairs, which tells more than whether their bars overlap."
        )
        shown = (Picture(chart, caption, "Chart of probe accuracies: " + _spoken_scores(results)),)
    return Section("Does a codeword stand for something?", text, shown, _comparison_table(results))


def probe_chart(results: Results) -> bytes | None:
    """The chart of all probes with their sampling errors; None without a number of test images."""
    number = results.get("num_test")
    panels: dict[str, list[Score]] = {}
    for metric, title in PERCENT_METRICS.items():
        for name in [*_names(results), UNTRAINED]:
            value = accuracy(results, metric, name)
            if value is not None and number:
                panels.setdefault(title, []).append(Score(name, value, binomial_error(value, number)))
    return score_chart(panels, chance=_chance(results)) if panels else None


def _spoken_scores(results: Results) -> str:
    parts = []
    for metric, title in PERCENT_METRICS.items():
        scores = [(name, accuracy(results, metric, name)) for name in [*_names(results), UNTRAINED]]
        words = ", ".join(f"{name} {value:.1f}%" for name, value in scores if value is not None)
        if words:
            parts.append(f"{title}: {words}")
    return "; ".join(parts) + "."


def comparisons(results: Results) -> list[Comparison]:
    """Every comparison that the page shows: perceptual against the other codebooks, all against the floor."""
    names = _names(results)
    pairs = [("perceptual", name) for name in ("control", "pixel", *names) if name != "perceptual"]
    pairs = list(dict.fromkeys(pairs)) + [(name, UNTRAINED) for name in names]
    found = [compare(results, metric, a, b) for metric in PERCENT_METRICS for a, b in pairs]
    return [comparison for comparison in found if comparison is not None]


def _comparison_table(results: Results) -> Table | None:
    found = comparisons(results)
    if not found:
        return None
    rows: list[tuple[str, str, str]] = []
    for item in found:
        word = item.verdict.value if item.verdict in (Verdict.HIGHER, Verdict.LOWER) else "not shown"
        if item.verdict is Verdict.UNKNOWN:
            word = "cannot be judged"
        group = (PERCENT_METRICS[item.metric], "", "")
        rows += [group] if group not in rows else []
        rows.append((f"{item.a} − {item.b}", item.signed, word))
    note = (
        "Differences in percent points ± their standard error. “Higher” and “lower” are said only beyond "
        "two standard errors; “not shown” means that this test cannot tell, not that there is no "
        "difference."
    )
    if len(found) > 2:
        note += f" With {len(found)} comparisons, mind that one in twenty passes that bar by chance alone."
    if not all(item.paired for item in found):
        note += " Where no paired error was recorded, scores are treated as independent, which is cautious."
    return Table(("Compared", "Points", "Reads as"), tuple(rows), note, text_columns=(0, 2))


def pretrained_vits(results: Results) -> Section | None:
    """What the pre-trained transformers have learnt, beside an untrained one; None where none was probed."""
    number = results.get("num_test")
    rows = []
    for one in results.get("tokenizers") or ():
        mim = one.get("mim")
        if mim:
            scores = [with_error(mim.get(key), number) for key in ("linear", "knn")]
            rows.append((str(one["name"]), fixed(mim.get("loss"), 2), fixed(mim.get("accuracy"), 1), *scores))
    floor = results.get("floor") or {}
    if not rows:
        return None
    if floor:
        rows.append((UNTRAINED, "–", "–", *(with_error(floor.get(key), number) for key in ("linear", "knn"))))
    text = (
        "The transformer sees an image with patches hidden and guesses their codes. What it has learnt "
        "is measured without fine-tuning: a linear classifier and a nearest-neighbour vote on its frozen "
        "features, beside the same transformer untrained."
    )
    note = (
        "Loss and code accuracy cannot be compared between rows: each model guesses the codes of its own "
        "codebook, and some codes are easier to guess without being better. Linear and k-NN are "
        "accuracies on test images."
    )
    header = ("Trained on codes of", "Loss", "Codes right, %", "Linear, %", "k-NN, %")
    return Section("What the transformers have learnt", text, table=Table(header, tuple(rows), note))


def how_to_read() -> Section:
    """What the errors on the page leave out."""
    text = (
        "The standard errors count one source of chance only: which test images there happened to be. "
        "They do not count the seed, which sets the first weights and the order of images and can move a "
        f"score by more than the bars show. This page comes from {ONE_SEED}.\n\n"
        "The networks are small here and the steps few. The paper trains for hundreds of epochs "
        "on ImageNet; nothing on this page confirms or refutes its numbers."
    )
    return Section("How to read this", text)


def _names(results: Results) -> list[str]:
    return [str(one.get("name", "?")) for one in results.get("tokenizers") or ()]


def _chance(results: Results) -> float | None:
    if results.get("chance") is not None:
        return float(results["chance"])
    return 100 / results["num_classes"] if results.get("num_classes") else None
