"""How any stage is trained: check everything, then make the folder, train, export."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from pecobook.data.sampler import fixed_permutation
from pecobook.data.source import ImageSource, Splits
from pecobook.data.stream import Stream
from pecobook.engine.stage import Stage
from pecobook.errors import DataError, PecobookError, PreflightError, RunFolderError, first_line
from pecobook.settings.training import TrainConfig
from pecobook.utils.distributed import on_first_rank

C = TypeVar("C", bound=TrainConfig)


def train(stage_type: type[Stage[C]], config: C) -> Path:
    """Run a stage from settings to export; returns the run folder.

    Raises:
        PreflightError: problems found before the run folder was made, all of them.
        PecobookError: what went wrong later.
    """
    from pecobook.engine import launch, run_folder

    splits = preflight(stage_type, config)
    config = dataclasses.replace(config, precision=launch.resolve_precision(config))  # type: ignore[arg-type]
    held = run_folder.prepare(config, stage_type.command) if launch.is_leader() else None
    try:
        fabric = launch.start(config)
        torch.manual_seed(config.seed)
        stage = stage_type.build(config, splits)
        outcome = _fit(stage_type, config, fabric, stage, splits)
        if outcome.finished:
            _export(config, stage)
    finally:  # also after an error: in Python the process goes on, and may try again
        if held is not None:
            held.release()
    if not outcome.finished:
        raise SystemExit(130)
    return Path(config.out)


def preflight(stage_type: type[Stage[C]], config: C) -> Splits:
    """Check everything that can be checked before anything is written. Raises PreflightError with all problems."""
    from pecobook.engine import launch, log, run_folder

    problems: list[PecobookError] = []
    splits: list[Splits] = []

    def look_at_precision() -> None:
        nonlocal config  # what a run is resumed with is compared with what auto came to
        config = dataclasses.replace(config, precision=launch.resolve_precision(config))  # type: ignore[arg-type]

    def look_at_data() -> None:
        opened = stage_type.open(config)
        check_readable(opened.train)
        if stage_type.needs_labels(config) and opened.train.labels is None:
            raise DataError(
                f"--data '{config.data}' has no labels: put the images of each class in a subfolder of its own."
            )
        if stage_type.needs_labels(config) and opened.evaluation.labels is None:
            raise DataError(f"--data '{config.data}' has no labels for its {opened.evaluation_name} images.")
        stage_type.check_data(config, opened)
        splits.append(opened)

    def look_at_folder() -> None:
        if launch.is_leader():
            run_folder.check(config, stage_type.command)

    checks: list[Callable[[], object]] = [
        look_at_precision,
        look_at_folder,
        look_at_data,
        lambda: stage_type.check(config),
        lambda: launch.micro_batch_size(config),
        lambda: log.check_loggers(config.loggers),
    ]
    for check in checks:
        try:
            check()
        except PecobookError as error:
            problems.append(error)
    if problems:
        raise PreflightError(problems)
    return splits[0]


def check_readable(source: ImageSource, count: int = 8) -> None:
    """Raise DataError when none of the first few images can be read."""
    from pecobook.data.decode import BadImage

    reasons = []
    for index in range(min(count, len(source))):
        try:
            source.read(index)
        except BadImage as error:
            reasons.append(str(error))
        else:
            return
    raise DataError(f"None of the first {len(reasons)} images of '{source.name}' can be read; the first: {reasons[0]}.")


def _fit(stage_type: type[Stage[C]], config: C, fabric: Any, stage: Stage[C], splits: Splits) -> Any:
    from pecobook.engine.loop import fit

    reference = None
    count = min(getattr(config, "knn_images", 0), len(splits.train))
    view = stage_type.reference_view(config)
    if view is not None and count and splits.train.labels is not None:
        chosen = splits.train.subset(fixed_permutation(i, len(splits.train)) for i in range(count))
        reference = Stream(chosen, view, 0)
    train, held_out = stage_type.companions(config)
    views = stage_type.num_views(config)
    return fit(
        fabric,
        stage,
        Stream(splits.train, stage_type.view(config), config.seed, companion=train, num_views=views),
        Stream(splits.evaluation, stage_type.evaluation_view(config), 0, companion=held_out),
        config=config,
        command=stage_type.command,
        reference=reference,
    )


def _export(config: TrainConfig, stage: Stage[Any]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(stage, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    folder = Path(config.out) / "export"

    def write() -> None:
        try:
            lines = stage.export(folder, cast("dict[str, Tensor]", state))
        except OSError as error:
            raise RunFolderError(
                f"The export cannot be written to '{folder}': {first_line(error).rstrip('.')}.\n"
                "The last checkpoint is whole. Make room, then go on with --resume."
            ) from None
        print(f"\nDone: {folder}\n\n{lines}", file=sys.stderr)

    on_first_rank(write)
