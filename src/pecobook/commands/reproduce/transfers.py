"""What a pre-trained ViT is good for: classification, segmentation, detection, and accuracy under attack.

Kinds of runs, which name the jobs `KIND-ARM-SEED`, and the figures that a table reads from each.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pecobook.analysis.charts import read_metrics
from pecobook.commands.jobs import Job
from pecobook.commands.paper_tables import ATTACKED
from pecobook.commands.predict.robustness import read_accuracy
from pecobook.data.dense.detection import open_detection
from pecobook.data.dense.segmentation import open_segmentation
from pecobook.data.source import Splits
from pecobook.errors import PecobookError
from pecobook.settings.reproduce import ReproduceConfig

TRANSFERS: dict[str, dict[str, str]] = {
    "classifier": {"finetuned": "evaluation/top1"},
    "attack": {name: name for name, _ in ATTACKED},
    "segment": {"miou": "evaluation/miou"},
    "detect": {"box_ap": "evaluation/box_ap", "mask_ap": "evaluation/mask_ap"},
}
"""Kind of a run to its figures, each with the name of its metric."""


def kinds_of(figures: Iterable[str]) -> list[str]:
    """Return the kinds of runs that these figures need."""
    wanted = set(figures)
    return [kind for kind, names in TRANSFERS.items() if wanted & names.keys()]


def transfer_figures(job: Job, names: dict[str, str]) -> dict[str, float | None]:
    """Return the figures of a finished job; None for one that it did not measure, as mask AP without masks."""
    if job.command == "predict":
        metrics = read_accuracy(job.out)
    else:
        metrics = {key: value for line in read_metrics(job.out / "metrics.jsonl") for key, value in line.items()}
    return {figure: metrics.get(name) for figure, name in names.items()}


@dataclasses.dataclass(frozen=True)
class DenseData:
    """The images of segmentation or of detection."""

    num_images: int
    """Number of training images."""
    settings: dict[str, Any]
    """The settings of `segment` or `detect` that name the images and their classes."""


def dense_data(config: ReproduceConfig, base: Mapping[str, Any]) -> dict[str, DenseData]:
    """Open the images of segmentation and detection that `config` names.

    `base` holds the settings of `segment` and `detect` that name the classes where `config` does not. Raises
    PecobookError.
    """
    classes = {
        "mask_values": config.segmentation_mask_values or base["segment"].mask_values,
        "ignore": config.segmentation_ignore or base["segment"].ignore,
    }
    sources: dict[str, tuple[str, dict[str, Any], Callable[..., Splits]]] = {
        "segment": ("segmentation", {"data": config.segmentation_data, **classes}, open_segmentation),
        "detect": ("detection", {"data": config.detection_data}, open_detection),
    }
    opened = {}
    for command, (flag, settings, opener) in sources.items():
        if settings["data"]:
            try:
                opened[command] = DenseData(len(opener(**settings).train), settings)
            except PecobookError as error:  # the message names the flags of `segment` and `detect`
                text = re.sub("--(data|mask-values|ignore)", rf"--{flag}-\1", str(error))
                raise type(error)(text) from None
    return opened
