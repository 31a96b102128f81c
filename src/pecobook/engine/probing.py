"""`--probe-data`: evaluates a stage's features on other images during training.

The images are read once and kept. At a probe every rank computes the features of its share, in evaluation mode and
without gradients; the first rank evaluates them. Nothing random is drawn and no weight changes, so a run is the same
with and without probes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from pecobook.data.batch import Batch
from pecobook.data.images import check_readable, has_labels, open_images
from pecobook.data.source import Splits
from pecobook.data.stream import Stream, ViewFunction, to_device
from pecobook.engine.evaluation import rank_share
from pecobook.engine.value_range import set_value_range
from pecobook.errors import DataError
from pecobook.settings.training import ProbedTrainConfig, TrainConfig
from pecobook.utils.distributed import gather_rows, long_on_first_rank, on_first_rank
from pecobook.utils.extras import require
from pecobook.utils.json_files import read_metrics

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_SHARE = 0.015
"""Share of the training time that probes may take if their interval is chosen automatically."""
_FIRST = 20
"""Step of the first probe if the interval is chosen: late enough to have measured the time of a step."""
_EVERY = "probe/every"
_FEW = 256  # images per rank that are read without starting processes


Features: TypeAlias = tuple[Tensor, Tensor | None]
Score: TypeAlias = Callable[[Features, Features], dict[str, float]]


def open_probe(config: TrainConfig) -> Splits | None:
    """Open the images of `--probe-data` with the run's value range; None without the flag.

    Raises:
        DataError: as for `open_images`, naming the flag.
    """
    if not isinstance(config, ProbedTrainConfig) or not config.probe_data:
        return None
    require("analysis", "--probe-data")
    try:
        splits = open_images(config.probe_data)
        set_value_range(splits, config.value_range)
        check_readable(splits.train)
    except DataError as error:
        raise DataError(f"--probe-data: {error}") from None
    return splits


def describe_probe(config: ProbedTrainConfig, splits: Splits) -> str:
    """Return a line for the user on the images of `--probe-data` and what they measure."""
    counts = [min(config.probe_images, len(part)) for part in (splits.train, splits.evaluation)]
    every = f"every {config.probe_every} steps" if config.probe_every else "in less than 2% of the time"
    classes = splits.train.classes if has_labels(splits) else None
    what = f"k-NN, linear probe and rank, {len(classes)} classes" if classes else "rank alone, without labels"
    return f"{counts[0]:,} and {counts[1]:,} held-out images of '{config.probe_data}', {every}: {what}"


class Probe:
    """The images of `--probe-data`, and when they are evaluated.

    Args:
        config: settings of the run, with the folder and the interval.
        splits: the images.
        view: makes a sample with `image`, uint8 (3, S, S), from an image.
        score: returns named values for the features (N, F) and labels (N,) of training and held-out images.
        start: step that the run starts or resumes from.
        total: number of steps of the run.
    """

    def __init__(
        self, config: ProbedTrainConfig, splits: Splits, view: ViewFunction, score: Score, start: int, total: int
    ) -> None:
        self.config, self.score, self.total = config, score, total
        self.streams = [Stream(part, view, 0) for part in (splits.train, splits.evaluation)]
        self.every = config.probe_every or on_first_rank(lambda: _recorded_interval(Path(config.out)))
        step = config.log_every
        self.first = start + -(-max(_FIRST, 2 * step) // step) * step - start % step
        self.last: dict[str, float] = {}
        """Results of the last probe."""
        self.skipped: list[str] = []
        """Names of the images that this rank could not read."""
        self._kept: list[list[Batch]] = []
        self._clock, self._half = (start, time.monotonic()), (start + self.first) // 2

    def is_due(self, step: int) -> bool:
        """Return whether to probe after `step` steps."""
        if step == self._half:
            self._clock = (step, time.monotonic())  # the first steps are slower than all others
        return step == self.total or (step % self.every == 0 if self.every else step == self.first)

    def measure(self, fabric: Fabric, model: Any, step: int, *, batch_size: int, workers: int) -> dict[str, float]:
        """Return the scores of the features; names begin with `probe/`, and all ranks get the same.

        The first probe of a run that chooses its interval records it as `probe/every`.
        """
        begun = time.monotonic()
        step_time = (begun - self._clock[1]) / max(step - self._clock[0], 1)
        self._kept = self._kept or [self._read(fabric, stream, batch_size, workers) for stream in self.streams]
        values = self._scores(fabric, model)
        if not self.every and step == self.first:
            again = time.monotonic()
            self._scores(fabric, model)  # the first time imports libraries too
            cost = time.monotonic() - again
            self.every = on_first_rank(lambda: interval(cost, step_time, self.config.log_every))
            values[_EVERY] = self.every
        self.last = values
        return values

    def _scores(self, fabric: Fabric, model: Any) -> dict[str, float]:
        model.eval()
        with torch.no_grad():
            train, test = (self._features(fabric, model, batches) for batches in self._kept)
        scores = long_on_first_rank(lambda: self.score(train, test))
        return {f"probe/{name}": value for name, value in scores.items()}

    def _read(self, fabric: Fabric, stream: Stream, batch_size: int, workers: int) -> list[Batch]:
        """Read this rank's share of the images once; those that other ranks also have are marked as repeated."""
        batches = []
        for batch in rank_share(fabric, stream, self.config.probe_images, batch_size, workers=workers, few=_FEW):
            self.skipped += batch["skipped"]
            kept: Batch = {"image": batch["image"], "repeated": batch["repeated"]}
            batches.append({**kept, "label": batch["label"]} if "label" in batch else kept)
        return batches

    @staticmethod
    def _features(fabric: Fabric, model: Any, batches: list[Batch]) -> Features:
        """Return the features (N, F) of all ranks' images, each once, and their labels (N,), on the host."""
        features, labels = [], []
        for kept in batches:
            batch = to_device(kept, fabric.device)
            counts = ~gather_rows(batch.pop("repeated"))
            label = batch.pop("label", None)
            features.append(gather_rows(model({**batch, "probe": True}).rows["features"])[counts].cpu())
            if label is not None:
                labels.append(gather_rows(label)[counts].cpu())
        return torch.cat(features), torch.cat(labels) if labels else None


def interval(cost: float, step_time: float, log_every: int) -> int:
    """Return the number of steps between probes of `cost` seconds each: at logged steps, below 2% of the time.

    Args:
        cost: seconds of a probe.
        step_time: seconds of a training step.
        log_every: number of steps between logged steps; the result is a multiple of it.
    """
    return max(math.ceil(cost / (_SHARE * max(step_time, 1e-6)) / log_every), 1) * log_every


def _recorded_interval(out: Path) -> int:
    """Return the interval that an earlier start of the run chose, 0 if none did."""
    file = out / "metrics.jsonl"
    found = [record[_EVERY] for record in read_metrics(file) if record.get(_EVERY)] if file.is_file() else []
    return int(found[-1]) if found else 0
