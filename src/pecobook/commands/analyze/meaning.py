"""Sections of the report on what codes mean: their position or their content, semantics or texture."""

from __future__ import annotations

from pecobook.analysis.position import MIN_PATCHES
from pecobook.analysis.report import Section
from pecobook.commands.analyze.tables import (
    PROBE_ROWS,
    Rows,
    Tokenizers,
    number,
    tokenizer_table,
    with_error,
    with_null,
)

INFORMATION = (("label", "the image's class"), ("colour", "the patch's colour"), ("edges", "the patch's edges"))
"""The values with which codes are compared, and the words for them."""
_CROSSED_ROWS: Rows = [
    ("position removed: linear probe of mean codewords, %", with_error("crossed_probe")),
    ("position removed: linear probe of bags of codes, %", with_error("crossed_bag_probe")),
]


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
                ("   given position, %", number("information", kind, "given_position", digits=1, factor=100)),
                ("   purity, %", with_null("information", kind, "purity")),
            ]
    note = (
        "Purity is the percentage of patches that have the most frequent value of their code; the purity of codes of "
        "other images is given in brackets. “Given position” is the share at a single position, as the mean over "
        "positions: there the position tells nothing, neither about the code nor about the value."
    )
    return Section("Semantics or texture", text, table=tokenizer_table(tokenizers, rows, note))
