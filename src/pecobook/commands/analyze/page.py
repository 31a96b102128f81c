"""The report of an analysis: what was measured, in tables and pictures, and how to read them.

`pecobook analyze` and `pecobook demo` write it. Each section is there when the results hold what it shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pecobook.analysis.report import Picture, Report, Section, Table
from pecobook.analysis.wording import duration, fixed, out_of, thousands
from pecobook.commands.analyze.comparing import (
    how_to_read,
    pretrained_vits,
    probe_comparisons,
    summary_of_comparisons,
    what_was_compared,
)

Tokenizers = Sequence[Mapping[str, Any]]


def compose(
    results: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    cost: Sequence[tuple[str, float]],
    settings: Mapping[str, Any],
    *,
    title: str = "",
    subtitle: str = "",
) -> Report:
    """The page of `analysis.json` and its pictures, by name of their file.

    Args:
        results: as `analysis.json` holds them; with `comparisons`, those of `pecobook demo` (see `comparing`).
        pictures: PNG.
        cost: each step of the run and its seconds.
        settings: shown as JSON.
        title: of the page; empty says how many tokenizers there are.
        subtitle: empty names the tokenizers.
    """
    tokenizers: Tokenizers = results["tokenizers"]
    number = len(tokenizers)
    in_pairs = "comparisons" in results
    parts = (
        what_was_compared(results) if in_pairs else None,
        _overview(results),
        probe_comparisons(results) if in_pairs else None,
        _semantics(results),
        _galleries(tokenizers, pictures),
        _reconstructions(pictures),
        _stability(tokenizers),
        _similarity(tokenizers),
        _usage(tokenizers, pictures),
        _maps(tokenizers, pictures),
        pretrained_vits(results),
        _masked(results, pictures),
        _training(pictures),
        how_to_read() if in_pairs else None,
        _cost(results, cost, settings),
    )
    whole = "What the codewords mean" if number == 1 else f"What the codewords of {number} tokenizers mean"
    return Report(
        title=title or whole,
        subtitle=subtitle or ", ".join(str(one["name"]) for one in tokenizers),
        summary=summary_of_comparisons(results) if in_pairs else _summary(results),
        facts=_facts(results),
        sections=tuple(part for part in parts if part is not None),
        footer="Made by pecobook, an open implementation of PeCo (arXiv 2111.12710). "
        "This page loads nothing from the network.",
    )


def _summary(results: Mapping[str, Any]) -> tuple[str, ...]:
    tokenizers: Tokenizers = results["tokenizers"]
    lines = []
    probed = [one for one in tokenizers if one.get("codeword_probe") is not None]
    if probed:
        said = ", ".join(f"{one['codeword_probe']:.1f}% ({one['name']})" for one in probed)
        lines.append(f"From the mean of an image's codewords a linear classifier names its class in {said}.")
    else:
        lines.append("The images have no labels, so whether codewords tell classes apart was not measured.")
    for one in tokenizers:
        told = one["information"]
        parts = [
            f"{100 * told[what]['share']:.1f}% of what there is to know of {words}"
            for what, words in _TOLD
            if what in told
        ]
        lines.append(f"A code of {one['name']} tells {', '.join(parts)}.")
    lines.append("One training of each tokenizer: differences between trainings are not in these figures.")
    return tuple(lines)


_TOLD = (("label", "the image's class"), ("colour", "the patch's colour"), ("edges", "its edges"))


def _facts(results: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    measured = [one["num_images"] for one in results["tokenizers"] if "num_images" in one]
    facts = (
        ("Images from", results.get("data")),
        ("Measured on", results.get("evaluation")),
        ("Images measured", measured and thousands(measured[0])),
        ("Images that could not be read", _count(results.get("skipped", {}).get("count"))),
        ("Training images", _count(results.get("num_train"))),
        ("Classes", _count(results.get("num_classes"))),
        ("Seed", results.get("seed")),
        ("Time", duration(results["seconds"]) if results.get("seconds") else None),
    )
    return tuple((label, str(value)) for label, value in facts if value or value == 0)


def _count(value: float | None) -> str | None:
    return thousands(value) if value else None


def _columns(
    tokenizers: Tokenizers, rows: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]], note: str = ""
) -> Table:
    """A row a figure, a column a tokenizer."""
    header = ("", *(str(one["name"]) for one in tokenizers))
    return Table(header, tuple((title, *(cell(one) for one in tokenizers)) for title, cell in rows), note)


def _overview(results: Mapping[str, Any]) -> Section:
    tokenizers: Tokenizers = results["tokenizers"]
    probes = [] if any("information" in one for one in tokenizers) else _PROBES  # else they stand beside it
    rows: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("pixels a token", lambda one: f"{one['stride']} x {one['stride']}" if "stride" in one else "–"),
        ("image size, pixels", lambda one: str(one.get("image_size", "–"))),
        ("codewords used", lambda one: out_of(one.get("codes_used"), one.get("num_codewords"))),
        ("perplexity", lambda one: fixed(one.get("perplexity"), 0)),
        *_of_banks(tokenizers),
        ("PSNR, dB", lambda one: fixed(one.get("psnr"), 2)),
        ("SSIM", lambda one: fixed(one.get("ssim"), 3)),
        ("perceptual distance", lambda one: fixed(one.get("perceptual_distance"), 3)),
        *probes,
    ]
    note = (
        "PSNR rewards equal pixels and a perceptual distance equal features, so each tokenizer does well on what it "
        "was trained for. Tokenizers with another stride spend another number of tokens on an image. A dash means not "
        "measured."
    )
    return Section("At a glance", "", table=_columns(tokenizers, rows, note))


def _of_banks(tokenizers: Tokenizers) -> list[tuple[str, Callable[[Mapping[str, Any]], str]]]:
    """Rows on all training images, where a token bank was given."""

    def cell(tell: Callable[[Mapping[str, Any]], str]) -> Callable[[Mapping[str, Any]], str]:
        return lambda one: tell(one["bank"]) if "bank" in one else "–"

    if not any("bank" in one for one in tokenizers):
        return []
    return [
        ("token bank: images", cell(lambda bank: thousands(bank["num_images"]))),
        ("token bank: codewords used", cell(lambda bank: thousands(bank["codes_used"]))),
        ("token bank: perplexity", cell(lambda bank: fixed(bank["perplexity"], 0))),
    ]


def _semantics(results: Mapping[str, Any]) -> Section | None:
    tokenizers: Tokenizers = results["tokenizers"]
    if not any("information" in one for one in tokenizers):
        return None
    rows: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = []
    text = (
        "Codes are compared with three things: the class of the image, the colour of the patch (27 coarse ones) and "
        "the strength of its edges (eight levels). Mutual information is given as a share of what there is to know of "
        "each, after taking off what codes of other images seem to know. A codebook is semantic rather than one of "
        "texture when the share of the class is large beside those of colour and edges, not when it is large alone."
    )
    if tokenizers[0]["codeword_probe"] is None:
        text += "\n\nThe images have no labels: what is said of classes needs them and is left out."
    else:
        rows += _PROBES
    if "classifier" in tokenizers[0]:
        rows += [
            ("originals classified rightly, %", lambda one: fixed(one["classifier"]["originals"], 1)),
            ("reconstructions classified rightly, %", lambda one: fixed(one["classifier"]["reconstructions"], 1)),
        ]
    for what, words in _TOLD:
        if what in tokenizers[0]["information"]:
            rows += [
                (f"tells of {words}, %", lambda one, what=what: fixed(100 * one["information"][what]["share"], 1)),  # type: ignore[misc]
                ("   purity, %", lambda one, what=what: _purity(one["information"][what])),  # type: ignore[misc]
            ]
    note = (
        "Purity: percent of patches that have the most frequent value of their code; in brackets, what codes of other "
        "images have. Errors are sampling errors of the probe on these images."
    )
    return Section("Semantic, or texture?", text, table=_columns(tokenizers, rows, note))


def _with_error(one: Mapping[str, Any], name: str) -> str:
    value, error = one.get(name), one.get(f"{name}_error")
    return f"{value:.1f} ± {error:.1f}" if value is not None and error is not None else "–"


_PROBES: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
    ("linear probe of mean codewords, %", lambda one: _with_error(one, "codeword_probe")),
    ("linear probe of bags of codes, %", lambda one: _with_error(one, "bag_probe")),
]


def _purity(told: Mapping[str, float]) -> str:
    return f"{told['purity']:.1f} ({told['null_purity']:.1f})"


def _galleries(tokenizers: Tokenizers, pictures: Mapping[str, bytes]) -> Section | None:
    shown = [
        Picture(png, "", f"Patches that share a codeword of {one['name']}", title=f"{one['name']}{where}")
        for kind, where in (("gallery", ""), ("bank-gallery", ", all training images"))
        for one in tokenizers
        if (png := _of(pictures, kind, one)) is not None
    ]
    text = (
        "Each block holds patches with the same codeword, outlined in their surroundings: first the codewords that "
        "were asked for and four drawn at random from those in use, then the most used ones. Patches are drawn at "
        "random, one from each image first. Look for what a block has in common: a colour, a texture, an edge, a part "
        "of a thing."
    )
    return Section("What shares a codeword", text, tuple(shown), side_by_side=True) if shown else None


def _of(pictures: Mapping[str, bytes], kind: str, one: Mapping[str, Any]) -> bytes | None:
    file = one.get("pictures", {}).get(kind)
    return None if file is None else pictures[file.removeprefix("pictures/")]


def _reconstructions(pictures: Mapping[str, bytes]) -> Section | None:
    if "reconstructions.png" not in pictures:
        return None
    picture = Picture(
        pictures["reconstructions.png"],
        "Held-out images, and what each tokenizer makes of them from codes alone.",
        "Grid of originals and reconstructions",
    )
    text = (
        "Codes are a narrow passage: what does not fit is lost, and the loss that trains the codebook decides what "
        "goes first. A blurred picture is not a worse codebook for pre-training, nor a sharp one a better."
    )
    return Section("What the codes keep of an image", text, (picture,))


def _stability(tokenizers: Tokenizers) -> Section | None:
    if not any("stability" in one for one in tokenizers):
        return None
    names = list(tokenizers[0]["stability"])
    rows: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        (name, lambda one, name=name: fixed(one["stability"].get(name), 1))  # type: ignore[misc]
        for name in names
    ]
    text = (
        "How many codes stay at their place when an image changes in ways that leave what it shows, in percent. A code "
        "that stands for a thing should stay; one that stands for exact pixels cannot. A quarter patch is another "
        "number of pixels for another stride."
    )
    return Section("How stable codes are", text, table=_columns(tokenizers, rows))


def _similarity(tokenizers: Tokenizers) -> Section | None:
    if not any("similarity" in one for one in tokenizers):
        return None
    rows: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = []
    for kind, title in (("shifted_over_blurred", "shifted"), ("agreement_with_people", "people")):
        rows += [
            (f"{title}: {name}", lambda one, k=kind, n=name: fixed(one["similarity"][k].get(n), 1))  # type: ignore[misc]
            for name in tokenizers[0]["similarity"].get(kind, {})
        ]
    text = (
        "A slightly shifted copy looks like the image and a blurred one does not, though pixels may say otherwise "
        "(paper, Figure 1). The table tells in percent how often a distance finds the shifted copy nearer: of pixels, "
        "of codewords at each place, and of the perceptual network where one is given."
    )
    if any(title.startswith("people") for title, _ in rows):
        number = thousands(tokenizers[0]["similarity"]["judgements"])
        text += f" Below, the percentage of people with whom a distance agrees, over {number} judgements."
    return Section("What looks alike", text, table=_columns(tokenizers, rows))


def _usage(tokenizers: Tokenizers, pictures: Mapping[str, bytes]) -> Section | None:
    if "usage.png" not in pictures:
        return None
    shown = [
        Picture(
            pictures["usage.png"],
            "How often each codeword is used. A line that ends early leaves codewords idle.",
            "Chart of codeword frequencies, most used first",
        )
    ]
    for one in tokenizers:
        png = _of(pictures, "positions", one)
        if png is not None:
            caption = f"{one['name']}: where few codewords occur, a place says little."
            shown.append(Picture(png, caption, f"Map of the places of {one['name']}"))
    return Section("How the codebook is used", "", tuple(shown), side_by_side=True)


def _maps(tokenizers: Tokenizers, pictures: Mapping[str, bytes]) -> Section | None:
    shown = []
    for one in tokenizers:
        for kind in ("map-usage", "map-classes"):
            png = _of(pictures, kind, one)
            if png is not None:
                shown.append(Picture(png, str(one["name"]), f"Codewords of {one['name']} on a plane"))
        near = _of(pictures, "neighbours", one)
        if near is not None:
            caption = f"{one['name']}: the most used codeword and its nearest neighbours among the codewords."
            shown.append(Picture(near, caption, f"Neighbouring codewords of {one['name']}"))
    text = "Codewords on a plane by t-SNE: near ones are alike. Crosses are codewords that these images do not use."
    return Section("The codebook as a landscape", text, tuple(shown), side_by_side=True) if shown else None


def _masked(results: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Section | None:
    found = results.get("masked_prediction")
    if not found:
        return None
    shown = [
        Picture(
            png, f"{name.split('-')[1].removesuffix('.png')}% of the patches hidden.", "Originals, masks, predictions"
        )
        for name, png in pictures.items()
        if name.startswith("masked-")
    ]
    rows = tuple(
        (f"{one['name']}, {part['masked']} hidden", fixed(part["accuracy"], 1), fixed(part["perplexity"], 1))
        for one in found
        for part in one["by_share"]
    )
    text = (
        "What each pre-trained transformer believes is behind the mask: its most probable codes, drawn by its "
        "tokenizer. Runs on different tokenizers guess different codes, so their accuracies do not rank them."
    )
    table = Table(("Run", "Codes right, %", "Perplexity"), rows)
    return Section("Behind the mask", text, tuple(shown), table)


_CURVES = {
    "curves-contrast.png": "feature network",
    "curves-tokenizers.png": "tokenizers",
    "curves-vits.png": "transformers",
}


def _training(pictures: Mapping[str, bytes]) -> Section | None:
    shown = [
        Picture(pictures[file], "", f"Training curves of the {words}", title=words)
        for file, words in _CURVES.items()
        if file in pictures
    ]
    text = "From the logs of the runs. Losses of runs with other terms or other networks are on other scales."
    return Section("How they were trained", text, tuple(shown), side_by_side=True) if shown else None


def _cost(results: Mapping[str, Any], cost: Sequence[tuple[str, float]], settings: Mapping[str, Any]) -> Section:
    total = sum(seconds for _, seconds in cost)
    rows = [(name, duration(seconds), f"{100 * seconds / total:.0f}%" if total else "–") for name, seconds in cost]
    rows.append(("Sum", duration(total), ""))
    whole = results.get("seconds")
    note = f"The whole run took {duration(whole)}, loading and drawing included." if whole else ""
    table = Table(("Step", "Time", "Share"), tuple(rows), note)
    details = json.dumps(settings, indent=2, default=str, ensure_ascii=False)
    return Section("Cost and settings", "", table=table, details=details, details_title="Settings")
