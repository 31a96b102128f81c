"""A classifier that looks at originals and at reconstructions (paper, Table 4, right)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.data.source import Splits
from pecobook.errors import ConfigError, DataError
from pecobook.models.checkpoints import load_state, read_weights
from pecobook.models.export import read_export
from pecobook.models.weights import IMAGENET_MEAN, IMAGENET_STD, create, exported_network
from pecobook.utils.devices import device

if TYPE_CHECKING:
    from pecobook.settings.analyze import AnalyzeConfig


class Classifier(nn.Module):
    """A timm network with a head, its input, and which of its classes are the data's.

    Args:
        network: the network.
        size: side it takes, pixels.
        mean: of its input's normalisation.
        std: the same.
        columns: int64 (C,), the number among its classes of each class of the data.
    """

    def __init__(
        self, network: nn.Module, size: int, mean: tuple[float, ...], std: tuple[float, ...], columns: Tensor
    ) -> None:
        super().__init__()
        self.network, self.size = network, size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])
        self.register_buffer("columns", columns)

    mean: Tensor
    std: Tensor
    columns: Tensor

    @torch.inference_mode()
    def accuracy(self, images: Tensor, labels: Tensor | None) -> float | None:
        """Percent of float images (N, 3, H, W) in [0, 1] classified rightly, among the data's classes alone."""
        if labels is None:
            return None
        device, right = self.mean.device, 0
        for part, own in zip(torch.split(images, 64), torch.split(labels, 64), strict=True):
            x = part.to(device)
            if x.shape[-1] != self.size:
                x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
            logits = self.network((x - self.mean) / self.std)[:, self.columns]
            right += int((logits.argmax(1).cpu() == own).sum())
        return round(100 * right / len(labels), 3)


def open_classifier(config: AnalyzeConfig, splits: Splits) -> Classifier:
    """The classifier that the settings name.

    Raises:
        PecobookError: there is none, or its classes are not the data's.
    """
    classes = splits.train.classes
    if classes is None:
        raise DataError(f"--classifier is of no use: --data '{config.data}' has no labels.")
    name = config.classifier
    if name.startswith("timm:"):
        bare = name.removeprefix("timm:")
        network = create(bare, pretrained=not config.classifier_weights)
        if config.classifier_weights:
            load_state(network, read_weights(config.classifier_weights), source=config.classifier_weights)
        settings = getattr(network, "pretrained_cfg", None) or {}
        count = int(network.num_classes)  # type: ignore[arg-type]
        if count != len(classes):
            raise ConfigError(
                f"--classifier {name} knows {count} classes and --data '{config.data}' has {len(classes)}: "
                "they must be the same ones, in the same order. A finetune run brings names of its own."
            )
        size, columns = settings.get("input_size", (3, 224, 224))[-1], torch.arange(count)
        mean, std = settings.get("mean", IMAGENET_MEAN), settings.get("std", IMAGENET_STD)
    else:
        exported, state = read_export(Path(name).parent if Path(name).is_file() else name)
        if exported.get("kind") != "classifier":  # segmenters and detectors have classes, too
            raise ConfigError(f"--classifier '{name}' is no run of pecobook finetune: it is a {exported.get('kind')}.")
        known = {label: number for number, label in enumerate(exported["classes"])}
        missing = [label for label in classes if label not in known]
        if missing:
            raise ConfigError(
                f"--classifier '{Path(name)}' does not know the class '{missing[0]}' of --data '{config.data}'"
                f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}."
            )
        network = exported_network(exported, state, name)
        size, columns = exported["image_size"], torch.tensor([known[label] for label in classes])
        mean, std = exported["mean"], exported["std"]
    return Classifier(network.eval(), size, tuple(mean), tuple(std), columns).eval().to(device())
