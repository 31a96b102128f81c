"""How any stage is trained: check everything, then make the folder, train, export."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from pecobook.data.images import check_readable
from pecobook.data.sampler import fixed_place
from pecobook.data.source import Splits
from pecobook.data.stream import Stream
from pecobook.engine.stage import Stage
from pecobook.errors import DataError, Preflight, RunFolderError, first_line
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

    config, splits, stage = preflight(stage_type, config)
    held = run_folder.prepare(config, stage_type.command) if launch.is_leader() else None
    try:
        outcome = _fit(stage_type, config, launch.start(config), stage, splits)
        if outcome.finished:
            _export(config, stage)
    finally:  # also after an error: in Python the process goes on, and may try again
        if held is not None:
            held.release()
    if not outcome.finished:
        raise SystemExit(130)
    return Path(config.out)


class Ready(NamedTuple, Generic[C]):
    """All that a run is made of before its folder is."""

    config: C
    """With the precision that auto came to."""
    splits: Splits
    stage: Stage[C]


def preflight(stage_type: type[Stage[C]], config: C) -> Ready[C]:
    """Check and make everything before anything is written. Raises PreflightError with all problems."""
    from pecobook.engine import launch, log, run_folder

    found = Preflight()
    precision = found.check(lambda: launch.resolve_precision(config))
    if precision is not None:  # what a run is resumed with is compared with what auto came to
        config = dataclasses.replace(config, precision=precision)  # type: ignore[arg-type]
    if launch.is_leader():
        found.check(lambda: run_folder.check(config, stage_type.command))
    splits = found.check(lambda: _open(stage_type, config))
    torch.manual_seed(config.seed)  # for all weights that are made from here to the end
    made = found.check(lambda: stage_type.check(config))
    found.check(lambda: launch.micro_batch_size(config))
    found.check(lambda: log.check_loggers(config.loggers))
    found.finish()
    assert splits is not None
    return Ready(config, splits, stage_type.build(config, splits, made))


def _open(stage_type: type[Stage[C]], config: C) -> Splits:
    splits = stage_type.open(config)
    check_readable(splits.train)
    if stage_type.needs_labels(config) and splits.train.labels is None:
        raise DataError(
            f"--data '{config.data}' has no labels: put the images of each class in a subfolder of its own."
        )
    if stage_type.needs_labels(config) and splits.evaluation.labels is None:
        raise DataError(f"--data '{config.data}' has no labels for its {splits.evaluation_name} images.")
    stage_type.check_data(config, splits)
    return splits


def _fit(stage_type: type[Stage[C]], config: C, fabric: Any, stage: Stage[C], splits: Splits) -> Any:
    from pecobook.engine.loop import fit

    reference = None
    count = min(getattr(config, "knn_images", 0), len(splits.train))
    view = stage_type.reference_view(config)
    if view is not None and count and splits.train.labels is not None:
        chosen = splits.train.subset(fixed_place(i, len(splits.train)) for i in range(count))
        reference = Stream(chosen, view, 0)
    train, held_out = stage.companions()
    views = stage.num_views()
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
