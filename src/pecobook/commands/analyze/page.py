"""The report of an analysis: tables and pictures of the measurements, with explanations.

`pecobook analyze` and `pecobook demo` write this report. A section is present if the results hold its data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from pecobook.analysis.comparison import lookup
from pecobook.analysis.report import Picture, Report, Section, Table
from pecobook.analysis.wording import duration, fixed, out_of, thousands
from pecobook.commands.analyze.comparing import (
    how_to_read,
    pretrained_vits,
    probe_comparisons,
    summary_of_comparisons,
    what_was_compared,
)

Tokenizer = Mapping[str, Any]
"""The metrics of one tokenizer, as in `analysis.json`."""
Tokenizers = Sequence[Tokenizer]
Rows = list[tuple[str, Callable[[Tokenizer], str]]]
"""The rows of a table: a title, and a function that returns the cell of a tokenizer."""


def compose(
    results: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    cost: Sequence[tuple[str, float]],
    settings: Mapping[str, Any],
    *,
    title: str = "",
    subtitle: str = "",
) -> Report:
    """Compose the report from the contents of `analysis.json` and the pictures.

    Args:
        results: the contents of `analysis.json`, or, with `comparisons`, the results of `pecobook demo` (see
            `comparing`).
        pictures: PNG bytes by file name.
        cost: name and seconds of each step of the run.
        settings: settings, which are shown as JSON.
        title: title of the page; if empty, the title contains the number of tokenizers.
        subtitle: subtitle of the page; if empty, the subtitle lists the tokenizers.
    """
    tokenizers: Tokenizers = results["tokenizers"]
    number = len(tokenizers)
    in_pairs = "comparisons" in results
    sections = (
        what_was_compared(results) if in_pairs else None,
        _overview(tokenizers),
        probe_comparisons(results) if in_pairs else None,
        _semantics(tokenizers),
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
    default_title = "What the codewords mean" if number == 1 else f"What the codewords of {number} tokenizers mean"
    return Report(
        title=title or default_title,
        subtitle=subtitle or ", ".join(str(tokenizer["name"]) for tokenizer in tokenizers),
        summary=summary_of_comparisons(results) if in_pairs else _summary(tokenizers),
        facts=_facts(results),
        sections=tuple(section for section in sections if section is not None),
        footer="Made by pecobook, an open implementation of PeCo (arXiv 2111.12710). "
        "This page loads nothing from the network.",
    )


def _summary(tokenizers: Tokenizers) -> tuple[str, ...]:
    lines = []
    probed = [tokenizer for tokenizer in tokenizers if tokenizer.get("codeword_probe") is not None]
    if probed:
        accuracies = ", ".join(f"{tokenizer['codeword_probe']:.1f}% ({tokenizer['name']})" for tokenizer in probed)
        lines.append(f"The accuracy of a linear classifier on the mean codeword of an image is {accuracies}.")
    else:
        lines.append("The images have no labels, so it was not measured how well codewords separate classes.")
    for tokenizer in tokenizers:
        parts = [
            f"{100 * tokenizer['information'][kind]['share']:.1f}% of the information about {words}"
            for kind, words in _INFORMATION
            if kind in tokenizer["information"]
        ]
        lines.append(f"A code of {tokenizer['name']} contains {', '.join(parts)}.")
    lines.append("Each tokenizer was trained once, so these numbers do not show the variation between trainings.")
    return tuple(lines)


_INFORMATION = (("label", "the image's class"), ("colour", "the patch's colour"), ("edges", "the patch's edges"))


def _facts(results: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    measured = [tokenizer["num_images"] for tokenizer in results["tokenizers"] if "num_images" in tokenizer]
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


def _number(*keys: str, digits: int) -> Callable[[Tokenizer], str]:
    """Return a function that formats the number under nested keys; a missing number becomes a dash."""
    return lambda tokenizer: fixed(lookup(tokenizer, *keys), digits)


def _table(tokenizers: Tokenizers, rows: Rows, note: str = "") -> Table:
    """Make a table with one row per metric and one column per tokenizer."""
    header = ("", *(str(tokenizer["name"]) for tokenizer in tokenizers))
    return Table(header, tuple((title, *(cell(tokenizer) for tokenizer in tokenizers)) for title, cell in rows), note)


def _token_size(tokenizer: Tokenizer) -> str:
    return f"{tokenizer['stride']} x {tokenizer['stride']}" if "stride" in tokenizer else "–"


def _overview(tokenizers: Tokenizers) -> Section:
    rows: Rows = [
        ("pixels a token", _token_size),
        ("image size, pixels", lambda tokenizer: str(tokenizer.get("image_size", "–"))),
        ("codewords used", lambda tokenizer: out_of(tokenizer.get("codes_used"), tokenizer.get("num_codewords"))),
        ("perplexity", _number("perplexity", digits=0)),
        *(_BANK_ROWS if any("bank" in tokenizer for tokenizer in tokenizers) else []),
        ("PSNR, dB", _number("psnr", digits=2)),
        ("SSIM", _number("ssim", digits=3)),
        ("perceptual distance", _number("perceptual_distance", digits=3)),
        # The section on semantics shows the probes too.
        *([] if any("information" in tokenizer for tokenizer in tokenizers) else _PROBE_ROWS),
    ]
    note = (
        "PSNR rewards equal pixels, and a perceptual distance rewards equal features, so each tokenizer is good at "
        "what it was trained for. Tokenizers with different strides use different numbers of tokens for an image. A "
        "dash means that the value was not measured."
    )
    return Section("Overview", "", table=_table(tokenizers, rows, note))


def _with_error(name: str, tokenizer: Tokenizer) -> str:
    value, error = tokenizer.get(name), tokenizer.get(f"{name}_error")
    return f"{value:.1f} ± {error:.1f}" if value is not None and error is not None else "–"


_PROBE_ROWS: Rows = [
    ("linear probe of mean codewords, %", partial(_with_error, "codeword_probe")),
    ("linear probe of bags of codes, %", partial(_with_error, "bag_probe")),
]
_BANK_ROWS: Rows = [
    ("token bank: images", lambda tokenizer: out_of(lookup(tokenizer, "bank", "num_images"), None)),
    ("token bank: codewords used", lambda tokenizer: out_of(lookup(tokenizer, "bank", "codes_used"), None)),
    ("token bank: perplexity", _number("bank", "perplexity", digits=0)),
]


def _semantics(tokenizers: Tokenizers) -> Section | None:
    if not any("information" in tokenizer for tokenizer in tokenizers):
        return None
    rows: Rows = []
    text = (
        "Codes are compared with three values: the class of the image, the colour of the patch (27 coarse colours) and "
        "the strength of the patch's edges (eight levels). The table gives the mutual information as a share of the "
        "entropy of each value, corrected by the mutual information with codes of other images. A codebook is semantic "
        "rather than a codebook of textures if the share of the class is large relative to the shares of colour and "
        "edges; a large share of the class alone is not enough."
    )
    if tokenizers[0]["codeword_probe"] is None:
        text += "\n\nThe images have no labels, so the measurements that need classes are left out."
    else:
        rows += _PROBE_ROWS
    if "classifier" in tokenizers[0]:
        rows += [
            ("classifier accuracy on originals, %", _number("classifier", "originals", digits=1)),
            ("classifier accuracy on reconstructions, %", _number("classifier", "reconstructions", digits=1)),
        ]
    for kind, words in _INFORMATION:
        if kind in tokenizers[0]["information"]:
            rows += [
                (f"information about {words}, %", partial(_share, kind)),
                ("   purity, %", partial(_purity, kind)),
            ]
    note = (
        "Purity is the percentage of patches that have the most frequent value of their code; the purity of codes of "
        "other images is given in brackets. Errors are sampling errors of the probe on these images."
    )
    return Section("Semantics or texture", text, table=_table(tokenizers, rows, note))


def _share(kind: str, tokenizer: Tokenizer) -> str:
    return fixed(100 * tokenizer["information"][kind]["share"], 1)


def _purity(kind: str, tokenizer: Tokenizer) -> str:
    information = tokenizer["information"][kind]
    return f"{information['purity']:.1f} ({information['null_purity']:.1f})"


def _galleries(tokenizers: Tokenizers, pictures: Mapping[str, bytes]) -> Section | None:
    galleries = [
        Picture(png, "", f"Patches that share a codeword of {tokenizer['name']}", title=f"{tokenizer['name']}{suffix}")
        for kind, suffix in (("gallery", ""), ("bank-gallery", ", all training images"))
        for tokenizer in tokenizers
        if (png := _picture_of(tokenizer, kind, pictures)) is not None
    ]
    text = (
        "Each block shows patches with the same codeword, outlined in their surroundings: first the requested "
        "codewords and four codewords drawn at random from those in use, then the most used codewords. The patches are "
        "drawn at random; each image gives one patch before any image gives a second one. Look for what the patches of "
        "a block have in common: a colour, a texture, an edge, a part of an object."
    )
    return Section("Patches that share a codeword", text, tuple(galleries), side_by_side=True) if galleries else None


def _picture_of(tokenizer: Tokenizer, kind: str, pictures: Mapping[str, bytes]) -> bytes | None:
    file = lookup(tokenizer, "pictures", kind)
    return None if file is None else pictures[file.removeprefix("pictures/")]


def _reconstructions(pictures: Mapping[str, bytes]) -> Section | None:
    if "reconstructions.png" not in pictures:
        return None
    picture = Picture(
        pictures["reconstructions.png"],
        "Held-out images, and the reconstructions that each tokenizer decodes from codes.",
        "Grid of originals and reconstructions",
    )
    text = (
        "Codes cannot hold all of an image, and the loss that trains the codebook decides which information is lost "
        "first. A blurred reconstruction does not mean a worse codebook for pre-training, and a sharp reconstruction "
        "does not mean a good one."
    )
    return Section("Reconstructions", text, (picture,))


def _stability(tokenizers: Tokenizers) -> Section | None:
    if not any("stability" in tokenizer for tokenizer in tokenizers):
        return None
    rows: Rows = [(name, _number("stability", name, digits=1)) for name in tokenizers[0]["stability"]]
    text = (
        "The table gives the percentage of codes that stay the same at their position when an image changes in a way "
        "that keeps its content. A code that represents an object should stay the same; a code that represents exact "
        "pixels cannot. A quarter patch is a different number of pixels for a different stride."
    )
    return Section("Stability of the codes", text, table=_table(tokenizers, rows))


def _similarity(tokenizers: Tokenizers) -> Section | None:
    if not any("similarity" in tokenizer for tokenizer in tokenizers):
        return None
    rows: Rows = [
        (f"{title}: {name}", _number("similarity", kind, name, digits=1))
        for kind, title in (("shifted_over_blurred", "shifted"), ("agreement_with_people", "people"))
        for name in tokenizers[0]["similarity"].get(kind, {})
    ]
    text = (
        "A slightly shifted copy looks similar to the image and a blurred copy does not, although the pixel error may "
        "suggest the opposite (paper, Figure 1). The table gives the percentage of images whose shifted copy is "
        "nearer, for the distance of pixels, of the codewords at each position, and of the perceptual network if there "
        "is one."
    )
    if "judgements" in tokenizers[0]["similarity"]:
        number = thousands(tokenizers[0]["similarity"]["judgements"])
        text += f" The rows below give the percentage of people who agree with a distance, over {number} judgements."
    return Section("Image similarity", text, table=_table(tokenizers, rows))


def _usage(tokenizers: Tokenizers, pictures: Mapping[str, bytes]) -> Section | None:
    if "usage.png" not in pictures:
        return None
    charts = [
        Picture(
            pictures["usage.png"],
            "How often each codeword is used. If a line ends early, many codewords are unused.",
            "Chart of codeword frequencies, most used first",
        )
    ]
    for tokenizer in tokenizers:
        png = _picture_of(tokenizer, "positions", pictures)
        if png is not None:
            name = tokenizer["name"]
            caption = f"{name}: a position with few different codewords carries little information."
            charts.append(Picture(png, caption, f"Map of positions of {name}"))
    return Section("Codebook usage", "", tuple(charts), side_by_side=True)


def _maps(tokenizers: Tokenizers, pictures: Mapping[str, bytes]) -> Section | None:
    maps = []
    for tokenizer in tokenizers:
        name = tokenizer["name"]
        for kind in ("map-usage", "map-classes"):
            png = _picture_of(tokenizer, kind, pictures)
            if png is not None:
                maps.append(Picture(png, str(name), f"Map of the codewords of {name}"))
        neighbours = _picture_of(tokenizer, "neighbours", pictures)
        if neighbours is not None:
            caption = f"{name}: the most used codeword and its nearest neighbours among the used codewords."
            maps.append(Picture(neighbours, caption, f"Neighbouring codewords of {name}"))
    text = (
        "Codewords in a plane, projected by t-SNE: similar codewords are near each other. Crosses are codewords that "
        "these images do not use."
    )
    return Section("Maps of the codebook", text, tuple(maps), side_by_side=True) if maps else None


def _masked(results: Mapping[str, Any], pictures: Mapping[str, bytes]) -> Section | None:
    runs = results.get("masked_prediction")
    if not runs:
        return None
    grids = [
        Picture(
            png, f"{name.split('-')[1].removesuffix('.png')}% of the patches masked.", "Originals, masks, predictions"
        )
        for name, png in pictures.items()
        if name.startswith("masked-")
    ]
    rows = tuple(
        (f"{run['name']}, {part['masked']} masked", fixed(part["accuracy"], 1), fixed(part["perplexity"], 1))
        for run in runs
        for part in run["by_share"]
    )
    text = (
        "The pictures show the most probable codes that each pre-trained transformer predicts for the masked patches, "
        "decoded by its tokenizer. Runs with different tokenizers predict different codes, so their accuracies cannot "
        "be compared."
    )
    return Section("Masked prediction", text, tuple(grids), Table(("Run", "Accuracy, %", "Perplexity"), rows))


_CURVES = {
    "curves-contrast.png": "feature network",
    "curves-tokenizers.png": "tokenizers",
    "curves-vits.png": "transformers",
}


def _training(pictures: Mapping[str, bytes]) -> Section | None:
    curves = [
        Picture(pictures[file], "", f"Training curves of the {words}", title=words)
        for file, words in _CURVES.items()
        if file in pictures
    ]
    text = "The curves come from the logs of the runs. Losses with different terms or networks have different scales."
    return Section("Training curves", text, tuple(curves), side_by_side=True) if curves else None


def _cost(results: Mapping[str, Any], cost: Sequence[tuple[str, float]], settings: Mapping[str, Any]) -> Section:
    total = sum(seconds for _, seconds in cost)
    rows = [(name, duration(seconds), f"{100 * seconds / total:.0f}%" if total else "–") for name, seconds in cost]
    rows.append(("Sum", duration(total), ""))
    elapsed = results.get("seconds")
    note = f"The whole run took {duration(elapsed)}, including loading and drawing." if elapsed else ""
    table = Table(("Step", "Time", "Share"), tuple(rows), note)
    details = json.dumps(settings, indent=2, default=str, ensure_ascii=False)
    return Section("Cost and settings", "", table=table, details=details, details_title="Settings")
