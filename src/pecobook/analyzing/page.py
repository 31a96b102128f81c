"""The report of an analysis: what was measured, in tables and pictures, and how to read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pecobook.analysis.report import Picture, Report, Section, Table
from pecobook.analysis.wording import duration, fixed, out_of, thousands

Tokenizers = Sequence[Mapping[str, Any]]


def compose(
    results: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    cost: Sequence[tuple[str, float]],
    settings: Mapping[str, Any],
) -> Report:
    """The page of `analysis.json` and its pictures."""
    tokenizers: Tokenizers = results["tokenizers"]
    number = len(tokenizers)
    parts = (
        _overview(results),
        _semantics(results),
        _galleries(tokenizers, pictures),
        _reconstructions(pictures),
        _stability(tokenizers),
        _similarity(tokenizers),
        _usage(tokenizers, pictures),
        _maps(tokenizers, pictures),
        _masked(results, pictures),
        _training(pictures),
        _cost(cost, settings),
    )
    return Report(
        title="What the codewords mean" if number == 1 else f"What the codewords of {number} tokenizers mean",
        subtitle=", ".join(str(one["name"]) for one in tokenizers),
        summary=_summary(results),
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
    facts = [("Images from", str(results["data"])), ("Measured on", str(results["evaluation"]))]
    facts += [("Images measured", thousands(results["tokenizers"][0]["num_images"]))]
    if results["skipped"]["count"]:
        facts += [("Images that could not be read", thousands(results["skipped"]["count"]))]
    if results["num_classes"]:
        facts += [("Classes", thousands(results["num_classes"]))]
    return (*facts, ("Time", duration(results["seconds"])))


def _columns(
    tokenizers: Tokenizers, rows: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]], note: str = ""
) -> Table:
    """A row a figure, a column a tokenizer."""
    header = ("", *(str(one["name"]) for one in tokenizers))
    return Table(header, tuple((title, *(cell(one) for one in tokenizers)) for title, cell in rows), note)


def _overview(results: Mapping[str, Any]) -> Section:
    rows: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
        ("pixels a token", lambda one: f"{one['stride']} x {one['stride']}"),
        ("image size, pixels", lambda one: str(one["image_size"])),
        ("codewords used", lambda one: out_of(one["codes_used"], one["num_codewords"])),
        ("perplexity", lambda one: fixed(one["perplexity"], 0)),
        *_of_banks(results["tokenizers"]),
        ("PSNR, dB", lambda one: fixed(one["psnr"], 2)),
        ("SSIM", lambda one: fixed(one["ssim"], 3)),
        ("perceptual distance", lambda one: fixed(one["perceptual_distance"], 3)),
    ]
    note = (
        "PSNR rewards equal pixels and a perceptual distance equal features, so each tokenizer does well on what it "
        "was trained for. Tokenizers with another stride spend another number of tokens on an image."
    )
    return Section("At a glance", "", table=_columns(results["tokenizers"], rows, note))


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


def _semantics(results: Mapping[str, Any]) -> Section:
    tokenizers: Tokenizers = results["tokenizers"]
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
        rows += [
            ("linear probe of mean codewords, %", lambda one: _with_error(one, "codeword_probe")),
            ("linear probe of bags of codes, %", lambda one: _with_error(one, "bag_probe")),
        ]
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


def _purity(told: Mapping[str, float]) -> str:
    return f"{told['purity']:.1f} ({told['null_purity']:.1f})"


def _galleries(tokenizers: Tokenizers, pictures: Mapping[str, bytes]) -> Section:
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
    return Section("What shares a codeword", text, tuple(shown), side_by_side=True)


def _of(pictures: Mapping[str, bytes], kind: str, one: Mapping[str, Any]) -> bytes | None:
    file = one["pictures"].get(kind)
    return None if file is None else pictures[file.removeprefix("pictures/")]


def _reconstructions(pictures: Mapping[str, bytes]) -> Section:
    picture = Picture(
        pictures["reconstructions.png"],
        "Held-out images, and what each tokenizer makes of them from codes alone.",
        "Grid of originals and reconstructions",
    )
    return Section("What the codes keep of an image", "", (picture,))


def _stability(tokenizers: Tokenizers) -> Section:
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


def _similarity(tokenizers: Tokenizers) -> Section:
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


def _usage(tokenizers: Tokenizers, pictures: Mapping[str, bytes]) -> Section:
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


def _maps(tokenizers: Tokenizers, pictures: Mapping[str, bytes]) -> Section:
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
    return Section("The codebook as a landscape", text, tuple(shown), side_by_side=True)


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


def _training(pictures: Mapping[str, bytes]) -> Section | None:
    shown = [
        Picture(pictures[file], "", f"Training curves of the {words}", title=words)
        for file, words in (("curves-tokenizers.png", "tokenizers"), ("curves-vits.png", "transformers"))
        if file in pictures
    ]
    text = "From the logs of the runs. Losses of runs with other terms or other networks are on other scales."
    return Section("How they were trained", text, tuple(shown), side_by_side=True) if shown else None


def _cost(cost: Sequence[tuple[str, float]], settings: Mapping[str, Any]) -> Section:
    table = Table(("Step", "Time"), tuple((name, duration(seconds)) for name, seconds in cost))
    return Section(
        "Cost and settings", "", table=table, details=json.dumps(settings, indent=2), details_title="Settings"
    )
