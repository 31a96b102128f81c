"""The demo's results told as a report that claims nothing its figures and their sampling errors do not show.

`results` is the demo's `results.json`:

    {"data", "seed", "seconds", "floor": {"linear", "knn"},
     "codebooks": [{"name": "pixel" | "control" | "perceptual", "codes_used", "perplexity", "psnr",
                    "perceptual_distance", "codeword_probe",
                    "mim": {"loss", "accuracy", "linear", "knn"} or null}]}

with accuracies in percent, and, where known, "num_train", "num_test", "num_classes", "chance" (percent),
"num_codewords" and "comparisons": [{"metric", "a", "b", "difference", "standard_error"}] in percent points.
Whatever is missing is left out of the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pecobook.analysis.charts import Metrics, Score, score_chart, training_curves
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
from pecobook.analysis.report import Picture, Report, Section, Table
from pecobook.analysis.wording import duration, fixed, out_of, thousands, with_error

Results = Mapping[str, Any]

ONE_SEED = "one seed; this is an illustration, not a result"

_ROLES = {
    "pixel": "“pixel” is trained on the error of its pixels alone",
    "control": "“control” adds a perceptual network with random weights, so it has the method but no knowledge",
    "perceptual": "“perceptual” adds the same network after training",
}
_NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six")


def demo_report(
    results: Results,
    pictures: Mapping[str, bytes],
    cost: Sequence[tuple[str, float]],
    settings: Mapping[str, Any],
    curves: Mapping[str, Mapping[str, Metrics]] | None = None,
) -> Report:
    """The report of a demo run.

    `pictures` (PNG) may hold `reconstructions`, `gallery:NAME`, `masked_prediction`, `usage`, `probes`
    and `training:NAME`; others are shown at the end under their name. The chart of probes is drawn here
    where it is not given, and so are training curves, from `curves`: title -> run -> logged steps. `cost`
    lists each step of the run and its seconds. `settings` are shown as JSON.
    """
    names = _names(results)
    number = _NUMBERS[len(names)] if len(names) < len(_NUMBERS) else str(len(names))
    plural = "codebook" if len(names) == 1 else "codebooks"
    parts = (
        _compared(results),
        _meaning(results, pictures),
        _galleries(results, pictures),
        _kept(results, pictures),
        _masked(results, pictures),
        _training(pictures, curves or {}),
        _others(pictures),
        _cost(results, cost),
        _reading(settings),
    )
    return Report(
        title=f"{number} {plural}, the same images",
        subtitle="What image tokens stand for when a codebook learns from pixels, "
        "and when a network judges what it has drawn.",
        summary=_summary(results),
        facts=_facts(results),
        sections=tuple(part for part in parts if part is not None),
        footer="Made by pecobook, an open implementation of PeCo (arXiv 2111.12710). "
        "This page loads nothing from the network.",
    )


def _summary(results: Results) -> tuple[str, ...]:
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


def _facts(results: Results) -> tuple[tuple[str, str], ...]:
    facts = [("Images from", str(results["data"]))] if results.get("data") else []
    for label, key in (
        ("Training images", "num_train"),
        ("Test images", "num_test"),
        ("Classes", "num_classes"),
        ("Codewords", "num_codewords"),
    ):
        if results.get(key):
            facts.append((label, thousands(results[key])))
    if results.get("seed") is not None:
        facts.append(("Seed", str(results["seed"])))
    if results.get("seconds"):
        facts.append(("Time", duration(results["seconds"])))
    return tuple(facts)


def _compared(results: Results) -> Section:
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


def _meaning(results: Results, pictures: Mapping[str, bytes]) -> Section:
    chance = _chance(results)
    text = (
        "A linear classifier sees nothing of an image but the mean of its codewords and has to name the "
        "class. The more it gets right, the more of the class the codewords hold."
    )
    if chance is not None:
        text += f" Guessing gives {chance:.1f}%."
    chart = pictures.get("probes") or probe_chart(results)
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


def _galleries(results: Results, pictures: Mapping[str, bytes]) -> Section | None:
    shown = []
    order = [*_names(results), *(key.partition(":")[2] for key in pictures if key.startswith("gallery:"))]
    for name in dict.fromkeys(order):
        png = pictures.get(f"gallery:{name}")
        if png is not None:
            shown.append(Picture(png, "", f"Patches that share a codeword of the {name} codebook", title=name))
    if not shown:
        return None
    text = (
        "Each block shows patches that were given the same codeword: the patch is outlined, the rest is "
        "its surroundings. The codewords are the most used ones and the patches are drawn at random, one "
        "from each image first; none were picked by hand. Look for what the patches of a block have in "
        "common: a colour, a texture, an edge, a part of a thing. A gallery gives an impression; the "
        "probe above is the measurement."
    )
    return Section("What shares a codeword", text, tuple(shown), side_by_side=True)


def _kept(results: Results, pictures: Mapping[str, bytes]) -> Section | None:
    books = list(results.get("codebooks") or ())
    shown = []
    if "reconstructions" in pictures:
        caption = "Test images and what each codebook makes of them from codes alone."
        shown.append(Picture(pictures["reconstructions"], caption, "Grid of originals and reconstructions"))
    if "usage" in pictures:
        caption = "How often each codeword is used. A line that ends early leaves codewords idle."
        shown.append(Picture(pictures["usage"], caption, "Chart of codeword frequencies, most used first"))
    if not books:
        return Section("What the codes keep of an image", "", tuple(shown)) if shown else None
    rows = tuple(
        (
            str(book.get("name", "?")),
            out_of(book.get("codes_used"), results.get("num_codewords")),
            fixed(book.get("perplexity"), 0),
            fixed(book.get("psnr"), 1),
            fixed(book.get("perceptual_distance"), 3),
            with_error(book.get("codeword_probe"), results.get("num_test")),
        )
        for book in books
    )
    header = (
        "Codebook",
        "Codewords used",
        "Perplexity",
        "PSNR, dB",
        "Perceptual distance",
        "Codeword probe, %",
    )
    note = (
        "PSNR rewards equal pixels and the perceptual distance equal features: each codebook is expected "
        "to do well on what it was trained for, so neither ranks them. A dash means not measured."
    )
    text = (
        "Codes are a narrow passage: what does not fit is lost, and the loss that trains the codebook "
        "decides what goes first. A blurred picture is not a worse codebook for pre-training, nor a "
        "sharp one a better."
    )
    return Section("What the codes keep of an image", text, tuple(shown), Table(header, rows, note))


def _masked(results: Results, pictures: Mapping[str, bytes]) -> Section | None:
    number = results.get("num_test")
    rows = []
    for book in results.get("codebooks") or ():
        mim = book.get("mim")
        if mim:
            scores = [with_error(mim.get(key), number) for key in ("linear", "knn")]
            rows.append((str(book["name"]), fixed(mim.get("loss"), 2), fixed(mim.get("accuracy"), 1), *scores))
    floor = results.get("floor") or {}
    if floor and rows:
        rows.append((UNTRAINED, "–", "–", *(with_error(floor.get(key), number) for key in ("linear", "knn"))))
    shown: tuple[Picture, ...] = ()
    if "masked_prediction" in pictures:
        caption = (
            "Original, what the transformer sees, and its guess: codes predicted where hidden, the "
            "tokenizer's own elsewhere, decoded to pixels. The visible part therefore shows what the "
            "codebook loses anyway."
        )
        alt = "Grid of originals, masked images and decoded predictions"
        shown = (Picture(pictures["masked_prediction"], caption, alt),)
    if not rows and not shown:
        return None
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
    return Section("Behind the mask", text, shown, Table(header, tuple(rows), note) if rows else None)


def _training(pictures: Mapping[str, bytes], curves: Mapping[str, Mapping[str, Metrics]]) -> Section | None:
    drawn = {key.partition(":")[2]: png for key, png in pictures.items() if key.startswith("training")}
    for title, runs in curves.items():
        if any(len(records) > 1 for records in runs.values()):
            drawn.setdefault(title, training_curves(runs))
    if not drawn:
        return None
    shown = tuple(Picture(png, "", f"Training curves {title}", title=title) for title, png in drawn.items())
    text = (
        "Faint lines are the logged values, strong ones their running mean. The losses of different "
        "codebooks have different terms, so their heights cannot be compared; whether they are still "
        "falling can."
    )
    return Section("How training went", text, shown)


def _others(pictures: Mapping[str, bytes]) -> Section | None:
    known = {"reconstructions", "usage", "probes", "masked_prediction"}
    rest = {
        key: png
        for key, png in pictures.items()
        if key not in known and key.partition(":")[0] not in ("gallery", "training")
    }
    shown = tuple(Picture(png, key.replace("_", " "), key) for key, png in rest.items())
    return Section("More pictures", "", shown) if shown else None


def _cost(results: Results, cost: Sequence[tuple[str, float]]) -> Section | None:
    if not cost:
        return None
    total = sum(seconds for _, seconds in cost)
    rows = [(name, duration(seconds), f"{100 * seconds / total:.0f}%" if total else "–") for name, seconds in cost]
    rows.append(("Sum", duration(total), ""))
    whole = results.get("seconds")
    note = f"The whole run took {duration(whole)}, loading and drawing included." if whole else ""
    return Section("What it cost", "", table=Table(("Step", "Time", "Share"), tuple(rows), note))


def _reading(settings: Mapping[str, Any]) -> Section:
    text = (
        "The standard errors count one source of chance only: which test images there happened to be. "
        "They do not count the seed, which sets the first weights and the order of images and can move a "
        f"score by more than the bars show. This page comes from {ONE_SEED}.\n\n"
        "The networks are small here and the steps few. The paper trains for hundreds of epochs "
        "on ImageNet; nothing on this page confirms or refutes its numbers."
    )
    details = json.dumps(settings, indent=2, sort_keys=True, default=str, ensure_ascii=False) if settings else ""
    return Section("How to read this", text, details=details, details_title="All settings")


def _names(results: Results) -> list[str]:
    return [str(book.get("name", "?")) for book in results.get("codebooks") or ()]


def _chance(results: Results) -> float | None:
    if results.get("chance") is not None:
        return float(results["chance"])
    return 100 / results["num_classes"] if results.get("num_classes") else None
