"""The classifier for originals and reconstructions (paper, Table 4, right)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.data.source import Splits
from pecobook.errors import ConfigError, DataError
from pecobook.models.checkpoints import left_aside, load_state, read_checkpoint
from pecobook.models.dry_run import dry_run
from pecobook.models.export import read_export
from pecobook.models.makers import Normalisation, file_normalisation, overridden, timm_normalisation, with_flags
from pecobook.models.network_traits import trained_size
from pecobook.models.weights import create_network, exported_network
from pecobook.settings.analyze import AnalyzeConfig
from pecobook.utils.devices import device
from pecobook.utils.printer import say


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
        reason = f" that can be used: {splits.train.unlabelled}" if splits.train.unlabelled else ""
        raise DataError(f"--classifier needs labels: --data '{config.data}' has no labels{reason}.")
    name = config.classifier
    if name.startswith("timm:"):
        network, size, normalisation = _open_timm(name, config)
        count = int(network.num_classes)  # type: ignore[arg-type]
        if count != len(classes):
            raise ConfigError(
                f"--classifier {name} has {count} classes and --data '{config.data}' has {len(classes)}: "
                "the classes must be the same, in the same order. (The classes of a finetune run are matched by name.)"
            )
        columns = torch.arange(count)
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
        normalisation = Normalisation(tuple(exported["mean"]), tuple(exported["std"]), "as the run was trained")
    normalisation = overridden(normalisation, config.classifier_mean, config.classifier_std)
    say(with_flags(normalisation.line(name), "--classifier-"))
    mean, std = normalisation.mean, normalisation.std
    dry_run(
        network.eval(),
        (torch.zeros(2, 3, size, size),),
        network=name,
        purpose=f"classify images of {size} pixels",
        backward=False,
    )
    return RestrictedClassifier(network.eval(), size, mean, std, columns).eval().to(device())


def _open_timm(name: str, config: AnalyzeConfig) -> tuple[nn.Module, int, Normalisation]:
    """Return a network of timm with its head, the side of its input in pixels, and its normalisation."""
    file, timm_name = config.classifier_weights, name.removeprefix("timm:")
    if not file:
        network = create_network(timm_name, True)
        settings = getattr(network, "pretrained_cfg", None) or {}
        return network, settings.get("input_size", (3, 224, 224))[-1], timm_normalisation(network, name)
    checkpoint = read_checkpoint(file)
    side = trained_size(timm_name, checkpoint.state)
    size_args: dict[str, Any] = {"img_size": side} if side else {}
    network = create_network(timm_name, **size_args)
    note = left_aside(file, checkpoint, load_state(network, checkpoint.state, source=file))
    say(note or "")
    settings = getattr(network, "pretrained_cfg", None) or {}
    normalisation = file_normalisation(checkpoint.state, checkpoint.wrapper, file, network, name)
    return network, side or settings.get("input_size", (3, 224, 224))[-1], normalisation
