"""Sections of the report that are tables, with one row per metric and one column per tokenizer.

A cell is a dash if its number is missing, and a row of dashes is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pecobook.analysis.comparison import lookup
from pecobook.analysis.position import MIN_PATCHES
from pecobook.analysis.report import Section, Table
from pecobook.analysis.wording import fixed, out_of, thousands
from pecobook.utils.json_files import is_number

Tokenizer = Mapping[str, Any]
"""The metrics of one tokenizer, as in `analysis.json`."""
Tokenizers = Sequence[Tokenizer]
Rows = list[tuple[str, Callable[[Tokenizer], str]]]
"""The rows of a table: a title, and a function that returns the cell of a tokenizer."""


def tokenizer_table(tokenizers: Tokenizers, rows: Rows, note: str = "") -> Table:
    """Make a table with one row per metric that was measured, and one column per tokenizer."""
    header = ("", *(str(tokenizer["name"]) for tokenizer in tokenizers))
    cells = [(title, *(cell(tokenizer) for tokenizer in tokenizers)) for title, cell in rows]
    measured = [row for row in cells if any(cell.strip("–() ") for cell in row[1:])]
    if any(cell == "–" for row in measured for cell in row):
        note = f"{note} A dash means that the value was not measured.".lstrip()
    return Table(header, tuple(measured), note)


def number(*keys: str, digits: int, factor: float = 1) -> Callable[[Tokenizer], str]:
    """Return a function that formats the number under nested keys, multiplied by `factor`."""

    def cell(tokenizer: Tokenizer) -> str:
        value = lookup(tokenizer, *keys)
        return fixed(factor * value if is_number(value) else None, digits)

    return cell


def with_null(*keys: str, factor: float = 1) -> Callable[[Tokenizer], str]:
    """Return a function that formats a number with one decimal, followed in brackets by that of permuted codes.

    The number for permuted codes has the key `null_KEY` next to the last key.
    """
    value, null = (number(*keys[:-1], key, digits=1, factor=factor) for key in (keys[-1], f"null_{keys[-1]}"))
    return lambda tokenizer: f"{value(tokenizer)} ({null(tokenizer)})"


def with_error(name: str) -> Callable[[Tokenizer], str]:
    """Return a function that formats the accuracy of a probe with its sampling error, if images suffice for one."""

    def cell(tokenizer: Tokenizer) -> str:
        value, error = tokenizer.get(name), tokenizer.get(f"{name}_error")
        if value is None:
            return "–"
        return "too few images" if error is None else f"{value:.1f} ± {error:.1f}"

    return cell


def _token_size(tokenizer: Tokenizer) -> str:
    return f"{tokenizer['stride']} x {tokenizer['stride']}" if "stride" in tokenizer else "–"


PROBE_ROWS: Rows = [
    ("linear probe of mean codewords, %", with_error("codeword_probe")),
    ("linear probe of bags of codes, %", with_error("bag_probe")),
]
_CROSSED_ROWS: Rows = [
    ("position removed: linear probe of mean codewords, %", with_error("crossed_probe")),
    ("position removed: linear probe of bags of codes, %", with_error("crossed_bag_probe")),
]
_BANK_ROWS: Rows = [
    ("token bank: images", lambda tokenizer: out_of(lookup(tokenizer, "bank", "num_images"), None)),
    ("token bank: codewords used", lambda tokenizer: out_of(lookup(tokenizer, "bank", "codes_used"), None)),
    ("token bank: perplexity", number("bank", "perplexity", digits=0)),
]
INFORMATION = (("label", "the image's class"), ("colour", "the patch's colour"), ("edges", "the patch's edges"))
"""The values that codes are compared with, and their descriptions."""


def overview_section(tokenizers: Tokenizers) -> Section:
    """Show the size of the tokens, the usage of the codebook, and the quality of reconstructions."""
    rows: Rows = [
        ("pixels a token", _token_size),
        ("image size, pixels", lambda tokenizer: str(tokenizer.get("image_size", "–"))),
        ("codewords used", lambda tokenizer: out_of(tokenizer.get("codes_used"), tokenizer.get("num_codewords"))),
        ("perplexity", number("perplexity", digits=0)),
        *(_BANK_ROWS if any("bank" in tokenizer for tokenizer in tokenizers) else []),
        ("PSNR, dB", number("psnr", digits=2)),
        ("SSIM", number("ssim", digits=3)),
        ("perceptual distance", number("perceptual_distance", digits=3)),
        # The section on position shows the probes too.
        *([] if any("position" in tokenizer for tokenizer in tokenizers) else PROBE_ROWS),
    ]
    note = (
        "PSNR rewards equal pixels, and a perceptual distance rewards equal features, so each tokenizer is good at "
        "what it was trained for. Tokenizers with different strides use different numbers of tokens for an image."
    )
    for tokenizer in tokenizers:
        if "predicts" in tokenizer:
            note += f" {tokenizer['name']} predicts {tokenizer['predicts']}, not pixels, and has no reconstructions."
    return Section("Overview", "", table=tokenizer_table(tokenizers, rows, note))


def position_section(tokenizers: Tokenizers) -> Section | None:
    """Show how far codes depend on the position, and the probes with and without it; None if it was not measured."""
    if not any("position" in tokenizer for tokenizer in tokenizers):
        return None
    rows: Rows = [
        ("information about the position, %", with_null("position", "share", factor=100)),
        ("codewords bound to one position, %", with_null("position", "bound")),
        ("codes that move with a crop, %", number("position", "moved", "crop", digits=1)),
        ("codes that move with a rolled image, %", number("position", "moved", "roll", digits=1)),
        *([*PROBE_ROWS, *_CROSSED_ROWS] if tokenizers[0].get("codeword_probe") is not None else []),
    ]
    text = (
        "A code should mean the same wherever it stands in an image. A tokenizer can also give each position a "
        "vocabulary of its own. Such codes distinguish images well, but they hardly move with the image. The "
        "information about the position is 100% if a code determines the position. The values in brackets are those of "
        "codes that are permuted between the positions of each image."
    )
    if tokenizers[0].get("codeword_probe") is not None:
        text += (
            "\n\nIn the rows “position removed” the probe is trained on the codes of one half of the positions, the "
            "black fields of a checkerboard, and tested on the codes of the other half. A code that has a meaning at a "
            "single position does not help this probe, but it helps the plain probe. A large accuracy of the plain "
            "probe alone therefore does not show that codes mean the same everywhere. The probe with position removed "
            "reads half of the codes of an image, so its accuracies are to be compared between tokenizers."
        )
    note = (
        f"A codeword of at least {MIN_PATCHES} patches is bound if all of its patches are at one position. An image is "
        "moved by one token, as a crop that begins one token further right and down, or as a roll, where the pixels "
        "that leave the image come in at the opposite side. Errors are sampling errors of the probe on these images."
    )
    return Section("Position or content", text, table=tokenizer_table(tokenizers, rows, note))


def semantics_section(tokenizers: Tokenizers) -> Section | None:
    """Compare the information of codes about classes, colours and edges; None if it was not measured."""
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
    if "classifier" in tokenizers[0]:
        rows += [
            ("classifier accuracy on originals, %", number("classifier", "originals", digits=1)),
            ("classifier accuracy on reconstructions, %", number("classifier", "reconstructions", digits=1)),
        ]
    for kind, words in INFORMATION:
        if kind in tokenizers[0]["information"]:
            rows += [
                (f"information about {words}, %", number("information", kind, "share", digits=1, factor=100)),
                (f"   given position: {words}, %", number("information", kind, "given_position", digits=1, factor=100)),
                (f"   purity: {words}, %", with_null("information", kind, "purity")),
            ]
    note = (
        "Purity is the percentage of patches that have the most frequent value of their code; the purity of codes of "
        "other images is given in brackets. “Given position” is the share at a single position, as the mean over "
        "positions: there the position tells nothing, neither about the code nor about the value."
    )
    return Section("Semantics or texture", text, table=tokenizer_table(tokenizers, rows, note))


def stability_section(tokenizers: Tokenizers) -> Section | None:
    """Show which codes stay the same under changes of the image; None if it was not measured."""
    if not any("stability" in tokenizer for tokenizer in tokenizers):
        return None
    rows: Rows = [(name, number("stability", name, digits=1)) for name in tokenizers[0]["stability"]]
    text = (
        "The table gives the percentage of codes that stay the same at their position when an image changes in a way "
        "that keeps its content. A code that represents an object should stay the same; a code that represents exact "
        "pixels cannot. A quarter patch is a different number of pixels for a different stride."
    )
    return Section("Stability of the codes", text, table=tokenizer_table(tokenizers, rows))


def similarity_section(tokenizers: Tokenizers) -> Section | None:
    """Show which distances find a shifted copy similar, and which agree with people; None if it was not measured."""
    if not any("similarity" in tokenizer for tokenizer in tokenizers):
        return None
    rows: Rows = [
        (f"{title}: {name}", number("similarity", kind, name, digits=1))
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
        judgements = thousands(tokenizers[0]["similarity"]["judgements"])
        text += (
            f" The rows below give the percentage of people who agree with a distance, over {judgements} judgements."
        )
    return Section("Image similarity", text, table=tokenizer_table(tokenizers, rows))
