"""Extending a run after its end: `--resume --max-steps MORE`, if its learning rate schedule allows it.

With a constant schedule the rates before the cooldown do not depend on the length of the training. A run that is
extended, or shortened, continues from a checkpoint before the earlier of both cooldowns, so that it takes exactly the
steps of a run that had the new length from the start.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pecobook.engine import checkpoint
from pecobook.engine.optim import cooldown_start
from pecobook.errors import RunFolderError
from pecobook.settings.durations import steps
from pecobook.settings.training import BaseOptimConfig, TrainConfig
from pecobook.settings.values import replace
from pecobook.utils.files import write_json

_LENGTHS = ("max-steps: ", "optim.cooldown: ")


def other_settings(changed: list[str], old: dict[str, Any], config: TrainConfig) -> list[str]:
    """Return the changes that a resumed run must not have: all but its length with a constant schedule."""
    constant = config.optim.schedule == old["optim"].get("schedule") == "constant"
    return [line for line in changed if not (constant and line.startswith(_LENGTHS))]


def remedy(changed: list[str], config: TrainConfig) -> str:
    """Return what to do if a run's length cannot change; an empty string if another setting is the obstacle."""
    if not (len(changed) == 1 and changed[0].startswith("max-steps: ")):
        return ""
    return (
        f"\nA {config.optim.schedule} schedule ends with its last step: train on from the weights in another run, with "
        f"--init {config.out} and another --out. Runs with --optim.schedule constant can be made longer."
    )


def common_steps(old: dict[str, Any], config: TrainConfig, num_images: int) -> int:
    """Return the number of steps with the same learning rates under the settings `old` and `config`."""
    before: BaseOptimConfig = replace(config.optim, {"cooldown": old["optim"]["cooldown"]})
    lengths = ((before, str(old["max_steps"])), (config.optim, config.max_steps))
    batch, starts = config.batch_size, []
    for optim, text in lengths:
        total = steps(text, num_images=num_images, batch_size=batch)
        starts.append(cooldown_start(optim, total=total, num_images=num_images, batch_size=batch))
    return min(starts)


def check(old: dict[str, Any], config: TrainConfig, num_images: int) -> None:
    """Raise RunFolderError unless the run in `config.out` has a checkpoint from which it can reach its new length.

    Args:
        old: the settings of the run.
        config: the settings with the new length.
        num_images: number of training images.
    """
    common, saved = common_steps(old, config, num_images), checkpoint.steps(Path(config.out) / "checkpoints")
    if saved and saved[0] > common:
        raise RunFolderError(
            f"--resume --max-steps {config.max_steps}: the run in '{config.out}' could go on from a step up to "
            f"{common:,}, where the earlier cooldown or end lies, and its first checkpoint is of step {saved[0]:,}.\n"
            f"Give a longer --max-steps, or train on in another run with --init {config.out} and another --out."
        )


def begin(out: Path, old: dict[str, Any], config: TrainConfig, num_images: int) -> str:
    """Record the new length in config.json, delete the checkpoints that no longer apply, and say so.

    Args:
        out: the run folder, whose lock is held.
        old: the content of config.json.
        config: the settings with the new length.
        num_images: number of training images.
    """
    folder, common = out / "checkpoints", common_steps(old, config, num_images)
    saved = checkpoint.steps(folder)
    first = max((step for step in saved if step <= common), default=0)
    before, after = (
        f"{length}, cooldown {cooldown}"
        for length, cooldown in (
            (old["max_steps"], old["optim"]["cooldown"]),
            (config.max_steps, config.optim.cooldown),
        )
    )
    note = f"--max-steps: {before} -> {after}."
    if saved and saved[-1] > common:
        note += (
            f" The learning rates differ after step {common:,}, so the run goes on from its checkpoint of step "
            f"{first:,} and trains the steps to {saved[-1]:,} again. export/ keeps the earlier weights until the end."
        )
        checkpoint.delete_after(folder, common)  # first: a run killed here also resumes from before the cooldown
    old["max_steps"], old["optim"]["cooldown"] = config.max_steps, config.optim.cooldown
    write_json(out / "config.json", old)
    return note
