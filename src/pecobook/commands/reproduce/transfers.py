"""Transfer of a pre-trained ViT: classification of images and clips, segmentation, detection, and accuracy under
attack.

Kinds of runs, which name the jobs `KIND-ARM-SEED`, and the figures that a table reads from each.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pecobook.commands.jobs import Job
from pecobook.commands.paper_tables import ATTACKED, CLIPS
from pecobook.commands.predict.robustness import read_accuracy
from pecobook.data.clips import open_clips
from pecobook.data.dense.detection import open_detection
from pecobook.data.dense.segmentation import open_segmentation
from pecobook.data.source import Splits
from pecobook.errors import PecobookError
from pecobook.settings.reproduce import ReproduceConfig
from pecobook.utils.json_files import last_evaluation

TRANSFERS: dict[str, dict[str, str]] = {
    "classifier": {"finetuned": "top1"},
    "attack": {name: name for name, _ in ATTACKED},
    "segment": {"miou": "miou"},
    "detect": {"box_ap": "box_ap", "mask_ap": "mask_ap"},
    **{name: {name: "top1"} for name, _ in CLIPS},
}
"""Figures of each kind of run, each with the name of its metric."""
DATA_FLAGS = {
    "segment": "--segmentation-data SOURCE",
    "detect": "--detection-data SOURCE",
    "kinetics": "--kinetics FOLDER",
    "ssv2": "--ssv2 FOLDER",
}
"""The flag that names the data of each kind of run that does not learn from the images of --data."""


def kinds_of(figures: Iterable[str]) -> list[str]:
    """Return the kinds of runs that these figures need."""
    wanted = set(figures)
    return [kind for kind, names in TRANSFERS.items() if wanted & names.keys()]


def transfer_figures(job: Job, names: dict[str, str]) -> dict[str, float | None]:
    """Return the figures of a finished job; None for one that it did not measure, such as mask AP without masks.

    Raises RunFolderError if its results are damaged.
    """
    metrics = read_accuracy(job.out) if job.command == "predict" else last_evaluation(job.out)
    return {figure: metrics.get(name) for figure, name in names.items()}


@dataclasses.dataclass(frozen=True)
class TransferData:
    """The images for segmentation or detection, or the clips."""

    num_images: int
    """Number of training images or clips."""
    settings: dict[str, Any]
    """The settings of the command that name the images and their classes."""


def transfer_data(config: ReproduceConfig, base: Mapping[str, Any], opens: bool) -> dict[str, TransferData]:
    """Open the images for segmentation and detection, and the clips, that `config` names; the keys are `DATA_FLAGS`.

    `base` provides the settings of `segment` and `detect` that name the classes, if `config` does not. Without `opens`
    nothing is opened, and a million images stand for them. Raises PecobookError.
    """
    classes = {
        "mask_values": config.segmentation_mask_values or base["segment"].mask_values,
        "ignore": config.segmentation_ignore or base["segment"].ignore,
    }
    sources: dict[str, tuple[dict[str, Any], Callable[..., Splits]]] = {
        "segment": ({"data": config.segmentation_data, **classes}, open_segmentation),
        "detect": ({"data": config.detection_data}, open_detection),
        **{name: ({"data": getattr(config, name)}, open_clips) for name, _ in CLIPS},
    }
    opened = {}
    for kind, (settings, opener) in sources.items():
        if settings["data"]:
            try:
                opened[kind] = TransferData(len(opener(**settings).train) if opens else 10**6, settings)
            except PecobookError as error:  # the message names the flags of another command
                flag = DATA_FLAGS[kind].partition(" ")[0]
                text = str(error).replace("--data", flag)
                text = re.sub("--(mask-values|ignore)", rf"{flag.removesuffix('data')}\1", text)
                raise type(error)(text) from None
    return opened
