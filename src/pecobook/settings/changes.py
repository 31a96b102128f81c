"""Comparison of the settings that a run began with and those it is resumed with."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from pecobook.errors import shown
from pecobook.settings.config_files import without_retired
from pecobook.settings.values import flag

# Fields that change devices, speed or logs of a run, but not its results: a resumed run may change them.
FREE_ON_RESUME = frozenset(
    {
        *("out", "resume", "overwrite", "dry_run", "verify_data", "accept_data_change"),
        *("devices", "num_nodes", "strategy", "micro_batch_size", "workers", "compile", "compile_mode", "attention"),
        *(f"tracking.{name}" for name in ("project", "entity", "group", "tags", "offline")),
        *("loggers", "log_every", "save_every", "save_minutes", "keep_checkpoints", "sample_every"),
        *("evaluation_images", "knn_images", "pyramid.checkpointing", "probe_data", "probe_every", "probe_images"),
        *("test.mode", "test.stride", "test.scales", "test.flip"),  # test.max_side also changes the training images
    }
)


def complete(old: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of an earlier version, with the defaults of the settings that the earlier version lacked."""
    old = without_retired(old)
    completed = defaults | old
    for name, value in defaults.items():
        if isinstance(value, dict) and isinstance(old.get(name), dict):
            completed[name] = complete(old[name], value)
    return completed


def _same_file(before: Any, after: Any) -> bool:
    """Return whether two settings are paths of the same file or folder, or patterns of the same files."""
    with contextlib.suppress(OSError, TypeError, ValueError):  # not paths, or paths of nothing that exists
        one, other = Path(before).absolute(), Path(after).absolute()
        return bool(before and after) and (one == other or one.samefile(other))
    return False


def changed_settings(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return a line such as `optim.lr: 0.001 -> 0.01` for every changed setting that must not change on resume."""
    lines: list[str] = []
    for name in sorted(old.keys() | new.keys()):
        before, after, full = old.get(name), new.get(name), prefix + name
        if isinstance(before, dict) and isinstance(after, dict):
            lines += changed_settings(before, after, f"{full}.")
        elif _lasting(before) != _lasting(after) and full not in FREE_ON_RESUME and not _same_file(before, after):
            lines.append(f"{flag(full)}: {before} -> {after}")
    return lines


def _lasting(value: Any) -> Any:
    """Return a setting without the signature in its URL, which expires before a run ends."""
    return shown(value) if isinstance(value, str) else value
