"""The base class of stages: an nn.Module that returns a loss, with class methods for `pecobook.stages.training`.

The class methods work on settings, before a module exists: they check the settings, open the data, and define the views
of an image. The loop calls the other methods. A new stage overrides the methods whose defaults do not fit.
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
    """The output of a stage's forward method."""

    loss: Tensor | None
    """Loss () with gradient; None in evaluation mode if the stage has no loss there."""
    metrics: dict[str, Tensor]
    """Metrics () each, detached; the loop averages them over accumulation steps and ranks. A metric named `loss` is
    shown instead of the loss itself."""
    pictures: dict[str, Tensor] = {}  # noqa: RUF012
    """Float (B, 3, H, W) in [0, 1] each, in evaluation mode only; the loop draws the first few."""
    rows: dict[str, Tensor] = {}  # noqa: RUF012
    """Rows (B, ...) each, or (1, ...) for a whole batch: in evaluation mode the input of `summarise`, in training the
    keys of a batch marked as `ahead`."""


class Stage(nn.Module, Generic[C]):
    """A training task whose forward method returns the loss. Subclasses override the methods that differ."""

    command: ClassVar[str]
    """Name of the stage's command on the command line."""
    min_batch_size = 1
    """Minimum number of images that the stage can learn from in one pass."""
    has_one_size = True
    """Whether all images of the stage, in training and evaluation, have the same size."""
    notes: tuple[str, ...] = ()
    """Lines on the weights that the stage starts from, for a run's preamble and its train.log."""

    # --------------------------------------------------------------------------------------- before the stage is built

    @classmethod
    def check(cls, config: C) -> Any:
        """Build the networks that the settings name, and return them for `build`, before anything is written.

        Raises:
            PecobookError: unusable settings or weights.
        """

    @classmethod
    def open(cls, config: C) -> Splits:
        """Open the images of `--data`."""
        return open_images(config.data)

    @classmethod
    def needs_labels(cls, config: C) -> bool:
        """Return whether the stage requires labels."""
        return False

    @classmethod
    def check_data(cls, config: C, splits: Splits) -> None:
        """Raise PecobookError if the images do not fit the settings."""

    @classmethod
    def build(cls, config: C, splits: Splits, prebuilt: Any = None) -> Stage[C]:
        """Build the stage; `prebuilt` is the result of `check`. Random weights come from torch's global generator.

        The base class returns the stage that `check` built, for stages that do not depend on the images.
        """
        stage: Stage[C] = cls(config) if prebuilt is None else prebuilt
        return stage

    @classmethod
    def view(cls, config: C) -> ViewFunction:
        """Return the function that turns an image into the stage's training sample."""
        raise NotImplementedError

    @classmethod
    def evaluation_view(cls, config: C) -> ViewFunction:
        """Return the function that turns a held-out image into a sample, the same in every evaluation."""
        raise NotImplementedError

    @classmethod
    def reference_view(cls, config: C) -> ViewFunction | None:
        """Return the function for the `--knn-images` labelled training images of the k-NN accuracy, or None."""
        return None

    @classmethod
    def probe_view(cls, config: C) -> ViewFunction | None:
        """Return the function that makes `image`, uint8 (3, S, S), from an image of `--probe-data`, or None.

        A batch of these is marked as `probe`, and `forward` returns their features (B, F) as rows.
        """
        return None

    # ----------------------------------------------------------------------------------------------------- in training

    def companions(self) -> tuple[Companion | None, Companion | None]:
        """Return functions of (image number, epoch) that add entries to a training and to a held-out sample."""
        return None, None

    @property
    def needs_full_batch_keys(self) -> bool:
        """Whether the next step's loss depends on all images of the step, computed without gradients, before the stage
        learns from the first micro-batch. The stage then gets batches marked as `ahead`, and each micro-batch contains
        the rows that the stage returned for them (`engine.ahead`).
        """
        return False

    def after_ahead(self, rows: dict[str, Tensor]) -> bool:
        """Use the rows of all images of a step before the first micro-batch; return whether to compute rows again."""
        return False

    def loss_count(self, batch: Batch) -> Tensor | None:
        """Return the number () of items, such as counted pixels, that a training batch's loss is averaged over.

        With it, the micro-batches of a step, on all ranks, are weighted as in one batch. None, the default, weights
        them equally, which is right for a mean over images.
        """
        return None

    def num_views(self) -> int:
        """Return the number of views of each image that training repeats; 0 makes a new view every epoch."""
        return 0

    def repeats(self) -> int:
        """Return how many views of each image a batch contains."""
        return 1

    def forward(self, batch: Batch) -> StageOutput:
        """Return the loss and detached metrics of a batch; in evaluation mode also pictures and rows."""
        raise NotImplementedError

    def parameter_groups(self, config: BaseOptimConfig) -> list[dict[str, Any]]:
        """Return parameter groups for the optimizer, with `lr_scale` where a learning rate differs."""
        return parameter_groups(self, config)

    def after_step(self, step: int, total: int) -> None:
        """Update the stage after optimizer step number `step` of `total`."""

    def warning(self, metrics: dict[str, float], step: int) -> str | None:
        """Return a warning for the user if `metrics` show that the run is going wrong."""
        return None

    # ------------------------------------------------------------------------------------------------- in evaluation

    def summarise(self, rows: dict[str, Tensor], reference_rows: dict[str, Tensor]) -> dict[str, float]:
        """Return metrics from the rows that evaluation gathered, given rows of `reference_view` (or none)."""
        return {}

    def report(self, folder: Path, rows: dict[str, Tensor], source: ImageSource) -> None:
        """Write files from the last evaluation's rows to the run folder. Called only on the first rank."""

    # ---------------------------------------------------------------------------------------------------- at the end

    def export(self, folder: Path, state: dict[str, Tensor]) -> str:
        """Write the export folder from the full `state` of this stage; return lines of Python that use the export."""
        raise NotImplementedError


def submodule_state(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the entries of a state dict that belong to the submodule `name`, under their names in that submodule."""
    prefix = f"{name}."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def mean_of_counted(values: Tensor, batch: Batch) -> Tensor:
    """Return the mean () of per-image values (B,), without images marked as `repeated`; 0 without images."""
    if "repeated" not in batch:
        return values.mean()
    repeated: Tensor = batch["repeated"]
    return values.masked_fill(repeated, 0).sum() / (~repeated).sum().clamp_min(1)
