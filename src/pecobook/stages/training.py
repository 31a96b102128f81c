"""Train any stage: check everything, make the run folder, train, export."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from pecobook.data.images import check_labels, check_readable
from pecobook.data.sampler import fixed_permutation
from pecobook.data.source import Splits
from pecobook.data.stream import Stream
from pecobook.engine.stage import Stage
from pecobook.errors import Preflight, RunFolderError, first_line
from pecobook.settings.training import TrainConfig
from pecobook.utils.distributed import on_first_rank

C = TypeVar("C", bound=TrainConfig)


def train(stage_type: type[Stage[C]], config: C) -> Path:
    """Train a stage from its settings to its export; returns the run folder.

    Raises:
        PreflightError: all problems found before the run folder was made.
        PecobookError: an error during the run.
    """
    from pecobook.engine import launch, run_folder

    with launch.signals(config):
        begun = launch.begin(
            config,
            lambda: preflight(stage_type, config),
            lambda ready: run_folder.prepare(ready.config, stage_type.command),
        )
        config, splits, stage = begun.ready
        try:
            outcome = _fit(stage_type, config, begun.fabric, stage, splits)
            if outcome.finished:
                _export(config, stage)
        finally:  # also after an error: the Python process may go on, and train again
            if begun.lock is not None:
                begun.lock.release()
    if not outcome.finished:
        raise SystemExit(130)
    return Path(config.out)


class Ready(NamedTuple, Generic[C]):
    """The checked parts of a run, before its folder is made."""

    config: C
    """The settings, with the resolved precision."""
    splits: Splits
    stage: Stage[C]


def preflight(stage_type: type[Stage[C]], config: C) -> Ready[C]:
    """Check and build everything before anything is written. Raises PreflightError with all problems."""
    from pecobook.engine import launch, log, run_folder
    from pecobook.engine.world import is_leader

    problems = Preflight()
    precision = problems.check(lambda: launch.resolve_precision(config))
    if precision is not None:  # --resume compares resolved precisions, not `auto`
        config = dataclasses.replace(config, precision=precision)  # type: ignore[arg-type]
    if is_leader():
        problems.check(lambda: run_folder.check(config, stage_type.command))
    splits = problems.check(lambda: _open(stage_type, config))
    torch.manual_seed(config.seed)  # seeds all random weights of the stage
    prebuilt = problems.check(lambda: stage_type.check(config))
    problems.check(lambda: launch.micro_batch_size(config))
    problems.check(lambda: log.check_loggers(config.loggers))
    problems.finish()
    assert splits is not None
    return Ready(config, splits, stage_type.build(config, splits, prebuilt))


def _open(stage_type: type[Stage[C]], config: C) -> Splits:
    splits = stage_type.open(config)
    check_readable(splits.train)
    if stage_type.needs_labels(config):
        check_labels(splits, config.data)
    stage_type.check_data(config, splits)
    return splits


def _fit(stage_type: type[Stage[C]], config: C, fabric: Any, stage: Stage[C], splits: Splits) -> Any:
    from pecobook.engine.loop import fit

    reference = None
    count = min(getattr(config, "knn_images", 0), len(splits.train))
    view = stage_type.reference_view(config)
    if view is not None and count and splits.train.labels is not None:
        subset = splits.train.subset(fixed_permutation(i, len(splits.train)) for i in range(count))
        reference = Stream(subset, view, 0)
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
                "The last checkpoint is complete. Free disk space, then continue with --resume."
            ) from None
        print(f"\nDone: {folder}\n\n{lines}", file=sys.stderr)

    on_first_rank(write)
