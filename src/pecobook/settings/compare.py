"""Settings of `pecobook compare`, which compares training runs side by side."""

from __future__ import annotations

from pecobook.settings.values import settings_class


@settings_class
class CompareConfig:
    """Compare training runs side by side: curves, last evaluations, the settings in which they differ."""

    runs: tuple[str, ...] = ()
    """Run folders of any training commands, including runs in progress; NAME=FOLDER names a run. On the command line
    they may come first, without the flag."""
    metrics: tuple[str, ...] = ()
    """Metrics in metrics.jsonl whose curves are drawn, such as loss or evaluation/psnr. If empty, up to eight that
    change: the loss, then those of evaluations."""
    out: str = ""
    """Folder to write: report.html, pictures/curves.png, compare.json."""
    overwrite: bool = False
    """Delete a comparison in --out first."""
