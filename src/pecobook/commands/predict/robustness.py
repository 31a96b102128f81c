"""Accuracy of a classifier under attack (paper, Table 11): `pecobook predict RUN IMAGES --attack.names bim mi-fgsm`."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from pecobook.analysis.adversarial import MOMENTUM, attack
from pecobook.analysis.wording import accuracy_with_error
from pecobook.data.images import check_labels
from pecobook.data.parts import class_indices
from pecobook.data.source import Splits
from pecobook.data.stream import central_crops
from pecobook.engine.log import Progress
from pecobook.engine.value_range import open_readable
from pecobook.errors import ConfigError
from pecobook.models.export import read_settings
from pecobook.models.weights import Classifier
from pecobook.settings.predict import AttackConfig, PredictConfig
from pecobook.utils.devices import device
from pecobook.utils.files import write_json
from pecobook.utils.images import to_float
from pecobook.utils.json_files import NUMBER, OBJECT, read_json

FILE = "robustness.json"
_BATCH = 64


class AttackedClassifier:
    """A run's classifier, restricted to the classes of the data, and its attacks.

    Raises:
        PecobookError: the run is not a classifier, or lacks classes of the data.
    """

    def __init__(self, config: PredictConfig, classes: tuple[str, ...]) -> None:
        kind = read_settings(config.run).get("kind")
        if kind != "classifier":
            raise ConfigError(f"--attack.names needs a finetune run of images: '{config.run}' is a {kind}.")
        self.model = Classifier.from_pretrained(config.run).to(device()).requires_grad_(False)
        columns = class_indices(self.model.classes, classes, f"'{config.run}'", config.images)
        self.columns = torch.tensor(columns, device=device())

    def logits(self, images: Tensor) -> Tensor:
        """Map float images (B, 3, S, S) in [0, 1] to logits (B, C) of the classes of the data."""
        return self.model(images)[:, self.columns]  # type: ignore[no-any-return]

    def hits(self, images: Tensor, labels: Tensor, settings: AttackConfig) -> dict[str, Tensor]:
        """Return which images uint8 (B, 3, S, S) are classified correctly, bool (B,), by attack; `clean` has none."""
        clean, truth = to_float(images.to(device())), labels.to(device())
        eps = settings.eps / 255
        step = settings.step / 255 or eps / settings.steps
        images_of = {"clean": clean}
        for name in settings.names:
            options = {"eps": eps, "step": step, "momentum": MOMENTUM[name]}
            images_of[name] = attack(self.logits, clean, truth, steps=settings.steps, **options)
        with torch.inference_mode():
            return {name: self.logits(x).argmax(1) == truth for name, x in images_of.items()}


def open_labelled(config: PredictConfig) -> tuple[AttackedClassifier, Splits]:
    """Open the images and the classifier. Raises PecobookError if the attacks are impossible."""
    splits = open_readable(config.images, config.value_range, [config.run])
    check_labels(splits, config.images)
    assert splits.train.classes is not None
    return AttackedClassifier(config, tuple(splits.train.classes)), splits


def measure(config: PredictConfig, classifier: AttackedClassifier, splits: Splits, out: Path) -> str:
    """Attack the held-out images, write robustness.json, and return a table. Raises DataError for unreadable images."""
    start, settings, source = time.monotonic(), config.attack, splits.evaluation
    total = min(settings.max_images, len(source))
    progress = Progress(total=total, start=0, name="attack", quiet=False)
    parts: dict[str, list[Tensor]] = {name: [] for name in ("clean", *settings.names)}
    side, share = int(classifier.model.image_size or 0), classifier.model.crop
    crops = central_crops(source, side, limit=total, batch_size=_BATCH, share=share)
    for done, batch in crops:
        if "image" in batch:
            for name, correct in classifier.hits(batch["image"], batch["label"], settings).items():
                parts[name].append(correct.cpu())
        progress.show(done, {})
    progress.close()
    hits = {name: torch.cat(values) for name, values in parts.items()}
    count = len(hits["clean"])
    accuracy = {name: round(100 * float(value.float().mean()), 3) for name, value in hits.items()}
    content = {"images": count, "skipped": total - count, "eps": settings.eps / 255, "steps": settings.steps}
    write_json(out / FILE, {**content, "accuracy": accuracy, "seconds": round(time.monotonic() - start, 3)})
    left_out = f", {total - count} more cannot be read" if count < total else ""
    title = f"{count} images ({splits.evaluation_name}){left_out}; eps {settings.eps:g}/255"
    rows = [f"  {name:8s} {accuracy_with_error(value, count)}" for name, value in accuracy.items()]
    return "\n".join([f"{title}, {settings.steps} steps; accuracy:", *rows])


def read_accuracy(folder: Path) -> dict[str, float]:
    """Return the accuracies of a finished measurement, in percent. Raises RunFolderError for a damaged file."""
    accuracy: dict[str, float] = read_json(folder / FILE, {"accuracy": OBJECT, "seconds": NUMBER})["accuracy"]
    return accuracy
