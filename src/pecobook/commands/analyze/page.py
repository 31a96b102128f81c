"""The report of an analysis: tables and pictures of the measurements, with explanations.

`pecobook analyze` and `pecobook demo` write this report. A section is present if the results hold its data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pecobook.analysis.atlas import Atlas, as_json, sprite_jpeg
from pecobook.analysis.comparison import lookup
from pecobook.analysis.probe import MIN_IMAGES
from pecobook.analysis.report import Picture, Report, Section, Table
from pecobook.analysis.wording import fixed, thousands
from pecobook.commands.analyze.comparing import (
    finding,
    how_to_read,
    leading_chart,
    pretrained_vits,
    probe_comparisons,
    summary_of_comparisons,
    what_was_compared,
)
from pecobook.commands.analyze.tables import (
    INFORMATION,
    Tokenizers,
    overview_section,
    position_section,
    semantics_section,
    similarity_section,
    stability_section,
)
from pecobook.engine.log import compact_duration


def compose(
    results: Mapping[str, Any],
    pictures: Mapping[str, bytes],
    cost: Sequence[tuple[str, float]],
    settings: Mapping[str, Any],
    *,
    title: str = "",
    subtitle: str = "",
    atlases: Mapping[str, Atlas] | None = None,
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
        atlases: the atlas of each tokenizer by its name.
    """
    tokenizers: Tokenizers = results["tokenizers"]
    number = len(tokenizers)
    in_pairs = "comparisons" in results
    sections = (
        what_was_compared(results) if in_pairs else None,
        overview_section(tokenizers),
        probe_comparisons(results) if in_pairs else None,
        position_section(tokenizers),
        semantics_section(tokenizers),
        _matches(pictures),
        _galleries(tokenizers, pictures),
        _reconstructions(pictures),
        stability_section(tokenizers),
        similarity_section(tokenizers),
        _usage(tokenizers, pictures),
        _atlas(tokenizers, pictures, atlases or {}),
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
        summary=summary_of_comparisons(results) if in_pairs else _summary(results, tokenizers),
        lead=leading_chart(results),
        facts=_facts(results),
        sections=tuple(section for section in sections if section is not None),
        footer="Made by pecobook, an open implementation of PeCo (arXiv 2111.12710). "
        "This page loads nothing from the network.",
    )


def _summary(results: Mapping[str, Any], tokenizers: Tokenizers) -> tuple[str, ...]:
    lines = []
    probed = [tokenizer for tokenizer in tokenizers if tokenizer.get("codeword_probe") is not None]
    if any(tokenizer.get("codeword_probe_error", 0) is None for tokenizer in probed):
        lines.append(f"Fewer than {MIN_IMAGES} held-out images are too few to say how well codewords separate classes.")
    elif probed:
        found = finding(results)
        lines += [found] if found else []
        accuracies = ", ".join(f"{tokenizer['codeword_probe']:.1f}% ({tokenizer['name']})" for tokenizer in probed)
        lines.append(f"The accuracy of a linear classifier on the mean codeword of an image is {accuracies}.")
        crossed = [tokenizer for tokenizer in probed if tokenizer.get("crossed_probe") is not None]
        if crossed:
            accuracies = ", ".join(f"{tokenizer['crossed_probe']:.1f}% ({tokenizer['name']})" for tokenizer in crossed)
            lines.append(
                f"With position removed, trained and tested on codes of different positions, it is {accuracies}. Only "
                "this accuracy shows that codes mean the same at different positions."
            )
    else:
        lines.append("The images have no labels, so it was not measured how well codewords separate classes.")
    for tokenizer in tokenizers:
        parts = [
            f"{100 * tokenizer['information'][kind]['share']:.1f}% of the information about {words}"
            for kind, words in INFORMATION
            if kind in tokenizer["information"]
        ]
        line = f"A code of {tokenizer['name']} contains {', '.join(parts)}."
        if "position" in tokenizer:
            share, null = (100 * tokenizer["position"][key] for key in ("share", "null_share"))
            line += (
                f" About its position in the image it contains {share:.1f}%, where permuted codes contain {null:.1f}%."
            )
        lines.append(line)
    lines.append("Each tokenizer was trained once, so these numbers do not show the variation between trainings.")
    return tuple(lines)


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
        ("Time", compact_duration(results["seconds"]) if results.get("seconds") else None),
    )
    return tuple((label, str(value)) for label, value in facts if value or value == 0)


def _count(value: float | None) -> str | None:
    return thousands(value) if value else None


def _galleries(tokenizers: Tokenizers, pictures: Mapping[str, bytes]) -> Section | None:
    text = (
        "Each block shows patches with the same codeword, outlined in their surroundings. On the left are codewords "
        "drawn at random from those in use, after the requested ones; they show what is usual. On the right are those "
        "of the largest class lift, or the most used ones if no class is more frequent than by chance; they show the "
        "best case. The patches are drawn at random; each image gives one patch before any image gives a second one. "
        "Look for what the patches of a block have in common: a colour, a texture, an edge, a part of an object.\n\n"
        "The map at the left of a block shows how often the codeword occurs at each position of the image, compared "
        "with its most frequent position, from dark to light. If one field alone is light, and all outlines lie in one "
        "corner, the codeword stands for a position rather than for what is seen there."
    )
    galleries = _pictures_of(tokenizers, pictures, "gallery", "gallery-ranked")
    galleries += _pictures_of(tokenizers, pictures, "bank-gallery")
    return Section("Patches that share a codeword", text, tuple(galleries), side_by_side=True) if galleries else None


def _matches(pictures: Mapping[str, bytes]) -> Section | None:
    if "matches.png" not in pictures:
        return None
    text = (
        "The patch on the left, outlined in its surroundings, has a codeword in each codebook. Each column shows other "
        "patches with this codeword: what the codebook holds to be the same. The patches on the left are drawn at "
        "random from the middle of held-out images, and the others at random from other images."
    )
    picture = Picture(
        pictures["matches.png"], "", "The same patches, and the patches that each codebook equates with them"
    )
    return Section("What each codebook holds to be the same", text, (picture,))


_PICTURE_TEXTS = {
    "gallery": ("", "Patches that share a codeword of {}, drawn at random", "{}: drawn at random"),
    "gallery-ranked": ("", "Patches that share a codeword of {}, ranked", "{}: ranked"),
    "bank-gallery": ("", "Patches that share a codeword of {}", "{}, all training images"),
    "positions": (
        "{}: a position with few different codewords carries little information.",
        "Map of positions of {}",
        "",
    ),
    "neighbours": (
        "{}: the most used codeword and its nearest neighbours among the used codewords.",
        "Neighbouring codewords of {}",
        "",
    ),
}
"""Caption, description and title of each kind of picture, with {} for the name of the tokenizer."""


def _pictures_of(tokenizers: Tokenizers, pictures: Mapping[str, bytes], *kinds: str) -> list[Picture]:
    """Return the pictures of these kinds, tokenizer by tokenizer; a kind that was not drawn is left out."""
    drawn = []
    for tokenizer in tokenizers:
        for kind in kinds:
            file = lookup(tokenizer, "pictures", kind)
            if file is not None:
                caption, alt, title = (text.format(tokenizer["name"]) for text in _PICTURE_TEXTS[kind])
                drawn.append(Picture(pictures[file.removeprefix("pictures/")], caption, alt, title=title))
    return drawn


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


def _usage(tokenizers: Tokenizers, pictures: Mapping[str, bytes]) -> Section | None:
    if "usage.png" not in pictures:
        return None
    chart = Picture(
        pictures["usage.png"],
        "How often each codeword is used. If a line ends early, many codewords are unused.",
        "Chart of codeword frequencies, most used first",
    )
    charts = (chart, *_pictures_of(tokenizers, pictures, "positions"))
    return Section("Codebook usage", "", charts, side_by_side=True)


def _atlas(tokenizers: Tokenizers, pictures: Mapping[str, bytes], atlases: Mapping[str, Atlas]) -> Section | None:
    shown = []
    for tokenizer in tokenizers:
        name = str(tokenizer["name"])
        if name in atlases:
            shown.append(_zoomable(name, atlases[name]))
        shown += _pictures_of([tokenizer], pictures, "neighbours")
    text = (
        "Every codeword that these images use, as one of its patches; codewords with similar vectors are near each "
        "other (t-SNE, then the cells of a grid). The patch shown is the one nearest to the mean of the codeword's "
        "patches, so it is typical; the galleries show how much the patches differ.\n\nDrag, pinch, or click and turn "
        "the wheel to zoom; point at a patch to read what is known about its codeword. Frames show how often a "
        "codeword is used, where in the image it occurs, its colour, or how much it tells about a class. Lift is the "
        "share of a class among the images with the codeword, divided by its share of all images; a frame is grey if "
        "no class is more frequent than by chance (at least 5 images, and below 5% after Bonferroni's correction)."
    )
    return Section("Atlas of the codebook", text, tuple(shown)) if shown else None


def _zoomable(name: str, atlas: Atlas) -> Picture:
    """Return the atlas as a picture that a script of the page can zoom."""
    jpeg, tiles = sprite_jpeg(atlas), as_json(atlas)
    size = round((len(jpeg) * 4 / 3 + len(json.dumps(tiles))) / 1000)
    used, total = thousands(len(atlas.codewords)), thousands(atlas.num_codewords)
    caption = f"{used} of {total} codewords are in use. This atlas takes {thousands(size)} kB of the page."
    return Picture(jpeg, caption, f"Atlas of the codewords of {name}", title=name, tiles=tiles)


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
        (
            f"{run['name']}, {part['masked']} masked",
            *(fixed(part.get(key), 1) for key in ("accuracy", "position_baseline", "perplexity")),
        )
        for run in runs
        for part in run["by_share"]
    )
    text = (
        "The pictures show the most probable codes that each pre-trained transformer predicts for the masked patches, "
        "decoded by its tokenizer. Runs with different tokenizers predict different codes, so their accuracies cannot "
        "be compared. The column “commonest code” gives the accuracy of predicting, at each position, the code that is "
        "the most frequent one there in other images: a model whose accuracy is the same has learned only where codes "
        "occur."
    )
    header = ("Run", "Accuracy, %", "Commonest code of the position, %", "Perplexity")
    return Section("Masked prediction", text, tuple(grids), Table(header, rows))


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
    rows = [(name, compact_duration(time), f"{100 * time / total:.0f}%" if total else "–") for name, time in cost]
    rows.append(("Sum", compact_duration(total), ""))
    elapsed = results.get("seconds")
    note = f"The whole run took {compact_duration(elapsed)}, including loading and drawing." if elapsed else ""
    table = Table(("Step", "Time", "Share"), tuple(rows), note)
    details = json.dumps(settings, indent=2, default=str, ensure_ascii=False)
    return Section("Cost and settings", "", table=table, details=details, details_title="Settings")
