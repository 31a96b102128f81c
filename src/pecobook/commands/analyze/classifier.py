"""The classifier for originals and reconstructions (paper, Table 4, right)."""

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
from pecobook.models.weights import IMAGENET_MEAN, IMAGENET_STD, create_network, exported_network
from pecobook.utils.devices import device

if TYPE_CHECKING:
    from pecobook.settings.analyze import AnalyzeConfig


class RestrictedClassifier(nn.Module):
    """A timm network with a head, restricted to the classes of the data.

    Args:
        network: the network.
        size: side of the input in pixels.
        mean: mean of the input's normalisation.
        std: standard deviation of the input's normalisation.
        columns: int64 (C,), the index of each class of the data among the network's classes.
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
        """Return the accuracy in percent on float images (N, 3, H, W) in [0, 1]; None without labels.

        Only the classes of the data can be predicted.
        """
        if labels is None:
            return None
        correct = 0
        for part, part_labels in zip(torch.split(images, 64), torch.split(labels, 64), strict=True):
            x = part.to(self.mean.device)
            if x.shape[-1] != self.size:
                x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
            logits = self.network((x - self.mean) / self.std)[:, self.columns]
            correct += int((logits.argmax(1).cpu() == part_labels).sum())
        return round(100 * correct / len(labels), 3)


def open_classifier(config: AnalyzeConfig, splits: Splits) -> RestrictedClassifier:
    """Load the classifier of the settings.

    Raises:
        PecobookError: the classifier does not exist, or does not have the classes of the data.
    """
    classes = splits.train.classes
    if classes is None:
        raise DataError(f"--classifier needs labels: --data '{config.data}' has no labels.")
    name = config.classifier
    if name.startswith("timm:"):
        network = create_network(name.removeprefix("timm:"), not config.classifier_weights)
        if config.classifier_weights:
            load_state(network, read_weights(config.classifier_weights), source=config.classifier_weights)
        settings = getattr(network, "pretrained_cfg", None) or {}
        count = int(network.num_classes)  # type: ignore[arg-type]
        if count != len(classes):
            raise ConfigError(
                f"--classifier {name} has {count} classes and --data '{config.data}' has {len(classes)}: "
                "the classes must be the same, in the same order. (The classes of a finetune run are matched by name.)"
            )
        size, columns = settings.get("input_size", (3, 224, 224))[-1], torch.arange(count)
        mean, std = settings.get("mean", IMAGENET_MEAN), settings.get("std", IMAGENET_STD)
    else:
        exported, state = read_export(Path(name).parent if Path(name).is_file() else name)
        if exported.get("kind") != "classifier":  # segmenters and detectors have classes, too
            raise ConfigError(f"--classifier '{name}' is not a finetune run: it is a {exported.get('kind')}.")
        index_of = {label: index for index, label in enumerate(exported["classes"])}
        missing = [label for label in classes if label not in index_of]
        if missing:
            raise ConfigError(
                f"--classifier '{Path(name)}' does not have the class '{missing[0]}' of --data '{config.data}'"
                f"{f' (and {len(missing) - 1} more are missing)' if len(missing) > 1 else ''}."
            )
        network = exported_network(exported, state, name)
        size, columns = exported["image_size"], torch.tensor([index_of[label] for label in classes])
        mean, std = exported["mean"], exported["std"]
    return RestrictedClassifier(network.eval(), size, tuple(mean), tuple(std), columns).eval().to(device())
