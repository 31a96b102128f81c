"""What a stage is: an nn.Module that returns a loss, and what `pecobook.stages.training` asks of its class before.

The class methods work on settings, before there is a module: they check, open the data, and say what is read of an
image. The loop calls the others. A new stage overrides what differs from the defaults here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from torch import Tensor, nn

from pecobook.data.batch import Batch
from pecobook.data.images import open_images
from pecobook.data.source import ImageSource, Splits
from pecobook.data.stream import Companion, ViewFunction
from pecobook.engine.optim import parameter_groups
from pecobook.settings.training import BaseOptimConfig, TrainConfig

C = TypeVar("C", bound=TrainConfig)


class StageOutput(NamedTuple):
    """What a stage's forward returns."""

    loss: Tensor | None
    """() with gradient; None in evaluation mode where a stage has no loss then."""
    metrics: dict[str, Tensor]
    """() each, detached; the loop averages them over accumulation steps and ranks. `loss` among them is shown instead
    of the loss itself."""
    pictures: dict[str, Tensor] = {}  # noqa: RUF012
    """Float (B, 3, H, W) in [0, 1] each, in evaluation mode only; the loop draws the first few."""
    rows: dict[str, Tensor] = {}  # noqa: RUF012
    """(B, ...) each, or (1, ...) of a whole batch: in evaluation mode what the stage sums up at the end, in training
    the keys that it makes of all images of a step first."""


class Stage(nn.Module, Generic[C]):
    """A training task: forward returns the loss. Subclasses override what differs."""

    command: ClassVar[str]
    """Name on the command line."""
    min_batch_size = 1
    """Fewest images that it learns from at once."""
    needs_full_batch_keys = False
    """Whether it makes keys of all images of a step, marked as `ahead` and without gradient, before it learns from the
    first micro-batch; the rows that it returns then come with each micro-batch (`engine.ahead`)."""

    # ------------------------------------------------------------------------------------------ before there is a stage

    @classmethod
    def check(cls, config: C) -> Any:
        """Make the networks that the settings name, for `build` to go on with.

        Raises:
            PecobookError: settings or weights that cannot work; told before anything is written.
        """

    @classmethod
    def open(cls, config: C) -> Splits:
        """Open `--data`."""
        return open_images(config.data)

    @classmethod
    def needs_labels(cls, config: C) -> bool:
        """Whether images without labels are of no use."""
        return False

    @classmethod
    def check_data(cls, config: C, splits: Splits) -> None:
        """Raise PecobookError when these images do not go with the settings."""

    @classmethod
    def build(cls, config: C, splits: Splits, made: Any = None) -> Stage[C]:
        """Make the stage of what `check` made, or of nothing, all random weights from torch's global generator."""
        raise NotImplementedError

    @classmethod
    def view(cls, config: C) -> ViewFunction:
        """What training reads of an image."""
        raise NotImplementedError

    @classmethod
    def evaluation_view(cls, config: C) -> ViewFunction:
        """What evaluation reads of a held-out image, without randomness that changes between evaluations."""
        raise NotImplementedError

    @classmethod
    def reference_view(cls, config: C) -> ViewFunction | None:
        """What evaluation reads of the `--knn-images` labelled training images that it compares with; None for none."""
        return None

    # ----------------------------------------------------------------------------------------------------- in training

    def companions(self) -> tuple[Companion | None, Companion | None]:
        """What goes with a training and with a held-out image beside its view, by (number of the image, epoch)."""
        return None, None

    def num_views(self) -> int:
        """Views of each image that training repeats; 0 makes a new one every epoch."""
        return 0

    def forward(self, batch: Batch) -> StageOutput:
        """Loss and detached metrics of a batch; in evaluation mode also pictures and rows."""
        raise NotImplementedError

    def parameter_groups(self, config: BaseOptimConfig) -> list[dict[str, Any]]:
        """Groups for the optimizer, with `lr_scale` where a rate differs."""
        return parameter_groups(self, config)

    def after_step(self, step: int, total: int) -> None:
        """Act once the optimizer has made step number `step` of `total`."""

    def warning(self, metrics: dict[str, float], step: int) -> str | None:
        """A sentence for the user when `metrics` show an unhealthy run."""
        return None

    # ------------------------------------------------------------------------------------------------- in evaluation

    def summarise(self, rows: dict[str, Tensor], known: dict[str, Tensor]) -> dict[str, float]:
        """Metrics of the rows that evaluation gathered, given the same rows of training images (empty without)."""
        return {}

    def report(self, folder: Path, rows: dict[str, Tensor], source: ImageSource) -> None:
        """Write into the run folder what the rows of the last evaluation are good for; on the first rank alone."""

    # ---------------------------------------------------------------------------------------------------- at the end

    def export(self, folder: Path, state: dict[str, Tensor]) -> str:
        """Write the export folder from the full `state` of this stage; returns lines of Python that load it."""
        raise NotImplementedError


def mean_of_counted(values: Tensor, batch: Batch) -> Tensor:
    """Mean () of one value an image, (B,), without those that evaluation marked as `repeated`; 0 of none."""
    if "repeated" not in batch:
        return values.mean()
    repeated: Tensor = batch["repeated"]
    return values.masked_fill(repeated, 0).sum() / (~repeated).sum().clamp_min(1)
