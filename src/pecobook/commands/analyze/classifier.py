"""The classifier for originals and reconstructions (paper, Table 4, right)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.data.images import check_labels
from pecobook.data.parts import class_indices
from pecobook.data.source import Splits
from pecobook.errors import ConfigError, DataError
from pecobook.models.checkpoints import left_aside, load_state, read_checkpoint
from pecobook.models.dry_run import dry_run
from pecobook.models.export import read_settings
from pecobook.models.makers import Normalisation, file_normalisation, overridden, timm_normalisation, with_flags
from pecobook.models.network_traits import trained_size
from pecobook.models.weights import Backbone, Classifier, create_network
from pecobook.settings.analyze import AnalyzeConfig
from pecobook.utils.devices import device
from pecobook.utils.printer import say


@dataclasses.dataclass(frozen=True)
class RestrictedClassifier:
    """A timm network with a head, restricted to the classes of the data."""

    network: Backbone
    """The network with its head and the normalisation of its input."""
    size: int
    """Side of the input in pixels."""
    columns: Tensor
    """int64 (C,), the index of each class of the data among the network's classes."""

    def accuracy(self, images: Tensor, labels: Tensor | None) -> float | None:
        """Return the accuracy in percent on float images (N, 3, H, W) in [0, 1]; None without labels.

        Only the classes of the data can be predicted.
        """
        return None if labels is None else round(100 * self.num_correct(images, labels) / len(labels), 3)

    @torch.inference_mode()
    def num_correct(self, images: Tensor, labels: Tensor) -> int:
        """Return the number of images (N, 3, H, W) that are classified as `labels`; arguments as for `accuracy`."""
        correct = 0
        for part, part_labels in zip(torch.split(images, 64), torch.split(labels, 64), strict=True):
            x = part.to(self.columns.device)
            if x.shape[-1] != self.size:
                x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
            logits = self.network(x)[:, self.columns]
            correct += int((logits.argmax(1).cpu() == part_labels).sum())
        return correct


def open_classifier(config: AnalyzeConfig, splits: Splits) -> RestrictedClassifier:
    """Load the classifier of the settings.

    Raises:
        PecobookError: the classifier does not exist, or lacks classes of the data.
    """
    try:
        check_labels(splits, config.data)
    except DataError as error:
        raise DataError(f"--classifier needs labels: {error}") from None
    name, classes = config.classifier, splits.train.classes or ()
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
        folder = Path(name).parent if Path(name).is_file() else name
        kind = read_settings(folder, kinds=("classifier",)).get("kind")
        if kind != "classifier":  # segmenters and detectors have classes, too
            raise ConfigError(f"--classifier '{name}' is not a finetune run: it is a {kind}.")
        run = Classifier.from_pretrained(folder)
        columns = torch.tensor(class_indices(run.classes, classes, f"--classifier '{Path(name)}'", config.data))
        network, size = run.network, int(run.image_size or 0)
        normalisation = Normalisation(run.mean, run.std, "as the run was trained")
    normalisation = overridden(normalisation, config.classifier_mean, config.classifier_std)
    say(with_flags(normalisation.line(name), "--classifier-"))
    images, purpose = torch.zeros(2, 3, size, size), f"classify images of {size} pixels"
    remedy = "Give another --classifier."
    dry_run(network.eval(), (images,), network=name, purpose=purpose, remedy=remedy, backward=False)
    classifier = Backbone(network, name, {}, normalisation.mean, normalisation.std, size).eval()
    return RestrictedClassifier(classifier.to(device()), size, columns.to(device()))


def _open_timm(name: str, config: AnalyzeConfig) -> tuple[nn.Module, int, Normalisation]:
    """Return a timm network with its head, the side of its input in pixels, and its normalisation."""
    file, timm_name, side = config.classifier_weights, name.removeprefix("timm:"), None
    if file:
        checkpoint = read_checkpoint(file)
        side = trained_size(timm_name, checkpoint.state)
        network = create_network(timm_name, **({"img_size": side} if side else {}))
        note = left_aside(file, checkpoint, load_state(network, checkpoint.state, source=file))
        say(note or "")
        normalisation = file_normalisation(checkpoint.state, checkpoint.wrapper, file, network, name)
    else:
        network = create_network(timm_name, True)
        normalisation = timm_normalisation(network, name)
    settings = getattr(network, "pretrained_cfg", None) or {}
    return network, side or settings.get("input_size", (3, 224, 224))[-1], normalisation
