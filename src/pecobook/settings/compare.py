"""Settings of `pecobook compare`, which sets training runs side by side."""

from __future__ import annotations

from pecobook.settings.values import settings_class


@settings_class
class CompareConfig:
    """Set training runs side by side: curves, last evaluations, the settings in which they differ."""

    runs: tuple[str, ...] = ()
    """Run folders of any training commands, also of runs that still train; NAME=FOLDER names a run. On the command line
    the runs may stand first, without the flag."""
    metrics: tuple[str, ...] = ()
    """Names in metrics.jsonl whose curves are drawn, such as loss or evaluation/psnr. Empty draws up to eight that
    change: the loss, then those of evaluations."""
    out: str = ""
    """Folder to write: report.html, pictures/curves.png, compare.json."""
    overwrite: bool = False
    """Delete a comparison in --out first."""
