"""The table of an evaluation, for the terminal and for evaluation.md: metrics in rows, tokenizers in columns."""

from __future__ import annotations

from typing import Any

from pecobook.analysis.report import Table, as_markdown

# Key in evaluation.json, words, format, key of the standard error.
_ROWS = (
    ("image_size", "image size, pixels", "{:,}", ""),
    ("tokens", "tokens of an image", "{:,}", ""),
    ("num_codewords", "codewords K", "{:,}", ""),
    ("rfid", "rFID (lower is better)", "{:.2f}", ""),
    ("is", "Inception score", "{:.2f}", ""),
    ("is_of_originals", "Inception score of the originals", "{:.2f}", ""),
    ("psnr", "PSNR, dB", "{:.3f}", "psnr_error"),
    ("ssim", "SSIM", "{:.4f}", "ssim_error"),
    ("lpips", "LPIPS (lower is better)", "{:.4f}", "lpips_error"),
    ("perceptual_distance", "perceptual distance (equation 4)", "{:.4f}", "perceptual_distance_error"),
    ("codes_used", "codewords used", "{:,}", ""),
    ("usage", "codewords used, %", "{:.2f}", ""),
    ("perplexity", "perplexity of the codes", "{:,.1f}", ""),
    ("entropy_bits", "entropy of a code, bits", "{:.3f}", ""),
    ("bits_per_pixel", "bits a pixel, log2 K", "{:.4f}", ""),
    ("entropy_bits_per_pixel", "bits a pixel, entropy", "{:.4f}", ""),
    ("gflop", "GFLOP an image", "{:.2f}", ""),
    ("images_per_second", "images/s, encode and decode", "{:,.1f}", ""),
)


def table(results: dict[str, Any]) -> Table:
    """Return the table for the content of evaluation.json; a row that no tokenizer has is left out."""
    tokenizers = results["tokenizers"]
    rows = []
    for key, words, form, error in _ROWS:
        cells = [_cell(values, key, form, error) for values in tokenizers]
        if set(cells) != {"-"}:
            rows.append((words, *cells))
    return Table(("metric", *(values["name"] for values in tokenizers)), tuple(rows))


def _cell(values: dict[str, Any], key: str, form: str, error: str) -> str:
    value, deviation = values.get(key), values.get(error)
    if value is None:
        return "-"
    return form.format(value) + ("" if deviation is None else f" ± {form.format(deviation)}")


def markdown(results: dict[str, Any]) -> str:
    """Return evaluation.md: the table, and what a reader needs to repeat the measurement."""
    protocol = results["protocol"]
    lines = [f"- {name.replace('_', ' ')}: {value}" for name, value in protocol.items() if name != "fingerprints"]
    notes = "\n\n".join(results["notes"])
    head = f"# Evaluation of {len(results['tokenizers'])} tokenizers"
    after = "After ± stands the standard error over images."
    return f"{head}\n\n{as_markdown(table(results))}\n\n{after}\n\n{notes}\n\n" + "\n".join(lines) + "\n"
