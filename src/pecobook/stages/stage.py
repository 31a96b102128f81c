"""What a stage is, and how any stage is trained: check everything, then make the folder, train, export.

A stage module (`codebook.py`, ...) offers one `StageKind`: how to check its settings, build its nn.Module, and turn an
image into what that module reads. Everything else is common and stands here and in the engine.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from pecobook.collectives import on_first_rank
from pecobook.config import OptimConfig, TrainConfig
from pecobook.data.images import open_images
from pecobook.data.sampler import fixed_place
from pecobook.data.source import ImageSource, Splits
from pecobook.data.stream import Batch, Companion, Stream, ViewFunction
from pecobook.engine.loop import StageOutput
from pecobook.engine.optim import parameter_groups
from pecobook.errors import DataError, PecobookError, PreflightError, RunFolderError, first_line

C = TypeVar("C", bound=TrainConfig)


class Stage(nn.Module):
    """A trainable: forward returns the loss. Subclasses override what differs."""

    least_images = 1
    """Fewest images that it learns from at once."""
    looks_ahead = False
    """Whether it sees all micro-batches of a step before it learns from the first."""

    def forward(self, batch: Batch) -> StageOutput:
        """Loss and detached metrics of a batch; in evaluation mode also pictures."""
        raise NotImplementedError

    def parameter_groups(self, config: OptimConfig) -> list[dict[str, Any]]:
        """Groups for the optimizer."""
        return parameter_groups(self, config)

    def after_step(self, step: int, total: int) -> None:
        """Act once the optimizer has made step number `step` of `total`."""

    def warning(self, metrics: dict[str, float], step: int) -> str | None:  # noqa: ARG002
        """A sentence for the user when `metrics` show an unhealthy run."""
        return None

    def summarise(self, rows: dict[str, Tensor], known: dict[str, Tensor]) -> dict[str, float]:  # noqa: ARG002
        """Metrics of the rows that evaluation gathered, given the same rows of training images (empty without)."""
        return {}

    def report(self, folder: Path, rows: dict[str, Tensor], source: ImageSource) -> None:
        """Write into the run folder what the rows of the last evaluation are good for; on the first rank alone."""

    def export(self, folder: Path, state: dict[str, Tensor]) -> str:
        """Write the export folder from the full `state` of this stage; returns Python lines that load it."""
        raise NotImplementedError


def mean_of_counted(values: Tensor, batch: Batch) -> Tensor:
    """Mean () of one value an image, (B,), without those that evaluation marked as `repeated`; 0 of none."""
    if "repeated" not in batch:
        return values.mean()
    repeated: Tensor = batch["repeated"]
    return values.masked_fill(repeated, 0).sum() / (~repeated).sum().clamp_min(1)


@dataclasses.dataclass(frozen=True)
class StageKind(Generic[C]):
    """One stage's part in `train`."""

    command: str
    """Name on the command line."""
    check: Callable[[C], None]
    """Raise PecobookError for settings or weights that cannot work, before anything is written."""
    build: Callable[[C, Splits], Stage]
    """Make the stage, all random weights from torch's global generator."""
    view: Callable[[C], ViewFunction]
    """What the stage reads of an image in training."""
    evaluation_view: Callable[[C], ViewFunction]
    """What it reads of a held-out image; without randomness that changes from one evaluation to the next."""
    reference_view: Callable[[C], ViewFunction] | None = None
    """What it reads of labelled training images that evaluation compares with, `--knn-images` of them."""
    companions: Callable[[C], tuple[Companion, Companion]] | None = None
    """What goes with a training and with a held-out image beside its view, by (number of the image, epoch)."""
    open: Callable[[C], Splits] = lambda config: open_images(config.data)
    """Open `--data`."""
    num_views: Callable[[C], int] = lambda _config: 0
    """Views of each image that training repeats; 0 makes a new one every epoch."""
    check_data: Callable[[C, Splits], None] = lambda _config, _splits: None
    """Raise PecobookError when these images do not go with the settings."""
    needs_labels: Callable[[C], bool] = lambda _config: False
    """Whether images without labels are of no use to it."""


def train(kind: StageKind[C], config: C) -> Path:
    """Run a stage from settings to export; returns the run folder.

    Raises:
        PreflightError: problems found before the run folder was made, all of them.
        PecobookError: what went wrong later.
    """
    from pecobook.engine import launch, run_folder

    splits = preflight(kind, config)
    config = dataclasses.replace(config, precision=launch.resolve_precision(config))  # type: ignore[arg-type]
    held = run_folder.prepare(config, kind.command) if launch.is_leader() else None
    try:
        fabric = launch.start(config)
        torch.manual_seed(config.seed)
        stage = kind.build(config, splits)
        outcome = _fit(kind, config, fabric, stage, splits)
        if outcome.finished:
            _export(config, stage)
    finally:  # also after an error: in Python the process goes on, and may try again
        if held is not None:
            run_folder.release(held)
    if not outcome.finished:
        raise SystemExit(130)
    return Path(config.out)


def preflight(kind: StageKind[C], config: C) -> Splits:
    """Check everything that can be checked before anything is written. Raises PreflightError with all problems."""
    from pecobook.engine import launch, log, run_folder

    problems: list[PecobookError] = []
    splits: list[Splits] = []

    def look_at_precision() -> None:
        nonlocal config  # what a run is resumed with is compared with what auto came to
        config = dataclasses.replace(config, precision=launch.resolve_precision(config))  # type: ignore[arg-type]

    def look_at_data() -> None:
        opened = kind.open(config)
        look_at_images(opened.train)
        if kind.needs_labels(config) and opened.train.labels is None:
            raise DataError(
                f"--data '{config.data}' has no labels: put the images of each class in a subfolder of its own."
            )
        if kind.needs_labels(config) and opened.evaluation.labels is None:
            raise DataError(f"--data '{config.data}' has no labels for its {opened.evaluation_name} images.")
        kind.check_data(config, opened)
        splits.append(opened)

    def look_at_folder() -> None:
        if launch.is_leader():
            run_folder.check(config, kind.command)

    checks: list[Callable[[], object]] = [
        look_at_precision,
        look_at_folder,
        look_at_data,
        lambda: kind.check(config),
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


def look_at_images(source: ImageSource, count: int = 8) -> None:
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


def _fit(kind: StageKind[C], config: C, fabric: Any, stage: Stage, splits: Splits) -> Any:
    from pecobook.engine.loop import fit

    reference = None
    count = min(getattr(config, "knn_images", 0), len(splits.train))
    if kind.reference_view is not None and count and splits.train.labels is not None:
        chosen = splits.train.subset(fixed_place(i, len(splits.train)) for i in range(count))
        reference = Stream(chosen, kind.reference_view(config), 0)
    train, held_out = kind.companions(config) if kind.companions else (None, None)
    views = kind.num_views(config)
    return fit(
        fabric,
        stage,
        Stream(splits.train, kind.view(config), config.seed, companion=train, num_views=views),
        Stream(splits.evaluation, kind.evaluation_view(config), 0, companion=held_out),
        config=config,
        command=kind.command,
        reference=reference,
    )


def _export(config: TrainConfig, stage: Stage) -> None:
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
        print(f"\nDone: {folder}\n\n{lines.format(path=config.out)}", file=sys.stderr)

    on_first_rank(write)
