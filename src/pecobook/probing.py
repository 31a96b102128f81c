"""`pecobook probe`: how much a frozen network, or a tokenizer's codewords, know of the labels.

Nothing is chosen on the test images: regularisation and layer are chosen on a validation part of the training images.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pecobook.config import positive
from pecobook.errors import ConfigError, DataError, RunFolderError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """Linear probe and k-NN of a frozen backbone, or of a tokenizer's codewords."""

    data: str = "photos"
    """Labelled images: a folder of class folders, a parquet file or folder, tar shards, hf:owner/name, or photos."""
    backbone: str = ""
    """A contrast, pretrain or finetune run, or timm:NAME; or a tokenizer, whose codewords are probed: a codebook run,
    dalle:FOLDER, diffusers:FOLDER."""
    weights: str = ""
    """A local file of weights, or random for the floor; empty takes the network's own."""
    out: str = ""
    """JSON file for the figures; empty only prints them."""
    image_size: int = 0
    """Side of the images, pixels; 0 takes the network's."""
    max_train: int = 50_000
    """Most training images; a fixed permutation chooses them."""
    max_test: int = 50_000
    """Most test images."""
    seed: int = 0
    """Of the validation part, and of random weights."""

    def __post_init__(self) -> None:
        positive(self, "max_train", "max_test")


@dataclasses.dataclass(frozen=True)
class Labelled:
    """Images and labels of both splits, read once."""

    train_images: Tensor
    """float (N, 3, S, S) in [0, 1]."""
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]


def probe(config: ProbeConfig | None = None, **settings: Any) -> dict[str, Any]:
    """Run both probes; prints a table and returns the figures (accuracies in percent).

    Raises:
        PecobookError: no labels, no such network, or a file that cannot be written.
    """
    from pecobook.config import replace

    config = replace(config or ProbeConfig(), settings)
    network, size = _open(config)
    if config.out and Path(config.out).exists():
        raise RunFolderError(f"--out '{config.out}' exists already: name another file.")
    data = read_labelled(config.data, config.image_size or size, config.max_train, config.max_test)
    _say(
        f"{len(data.train_labels):,} training and {len(data.test_labels):,} test images of {len(data.classes)} classes"
    )
    results = probe_features(
        network(data.train_images), network(data.test_images), data.train_labels, data.test_labels, seed=config.seed
    )
    for name, result in results.items():
        _say(f"{name:<7} {result['accuracy']:.1f} ± {result['standard_error']:.1f} %   ({result['features']})")
    if config.out:
        from pecobook.files import write_atomically

        shown = {kind: {k: v for k, v in result.items() if k != "correct"} for kind, result in results.items()}
        write_atomically(Path(config.out), (json.dumps(shown, indent=2) + "\n").encode())
    return results


def _open(config: ProbeConfig) -> tuple[Any, int]:
    """What turns images into named features, and the side of the images it takes."""
    import torch

    from pecobook.analysis.features import backbone_features, tokenizer_features
    from pecobook.models.tokenizers import load_tokenizer
    from pecobook.models.weights import load_backbone, read_export

    if not config.backbone:
        raise ConfigError("--backbone is missing: give a run of pecobook, or timm:NAME.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    is_run = Path(config.backbone).exists() and read_export(config.backbone)[0].get("kind") == "tokenizer"
    if is_run or config.backbone.startswith(("dalle:", "diffusers:")):
        tokenizer = load_tokenizer(config.backbone).to(device)
        return lambda images: tokenizer_features(tokenizer, images.to(device)), tokenizer.image_size
    torch.manual_seed(config.seed)
    backbone = load_backbone(config.backbone, weights=config.weights or None, image_size=config.image_size or None)
    backbone.network.to(device)
    return lambda images: backbone_features(backbone, images), backbone.image_size or 224


def read_labelled(source: str, size: int, max_train: int, max_test: int) -> Labelled:
    """Labelled images of both splits as central crops. Raises DataError when there are no labels."""
    from pecobook.data.images import open_images
    from pecobook.data.stream import read_all
    from pecobook.data.views import to_float

    splits = open_images(source)
    train, train_labels, _ = read_all(splits.train, size, limit=max_train)
    test, test_labels, _ = read_all(splits.evaluation, size, limit=max_test)
    if train_labels is None or test_labels is None:
        raise DataError(f"--data '{source}' has no labels: put the images of each class in a subfolder of its own.")
    return Labelled(to_float(train), train_labels, to_float(test), test_labels, splits.train.classes or ())


def probe_features(
    train: Mapping[str, Tensor], test: Mapping[str, Tensor], train_labels: Tensor, test_labels: Tensor, *, seed: int
) -> dict[str, dict[str, Any]]:
    """Linear probe and k-NN; among several sets of features, the one with the best validation accuracy is reported.

    Args:
        train: name to (N, F) features of training images.
        test: the same of test images.
        train_labels: int64 (N,).
        test_labels: int64 (M,).
        seed: of the validation part.

    Returns:
        {"linear", "knn"}, each with accuracy and standard_error (percent), features (the chosen set) and correct (a
        list of M booleans).
    """
    from pecobook.analysis.probe import knn_probe, linear_probe

    linear = {name: linear_probe(train[name], train_labels, test[name], test_labels, seed=seed) for name in train}
    best = max(linear, key=lambda name: linear[name].validation_accuracy or 0.0)
    knn = knn_probe(train[best], train_labels, test[best], test_labels)
    return {
        kind: {**result.summary(), "features": best, "correct": result.correct.tolist()}
        for kind, result in (("linear", linear[best]), ("knn", knn))
    }


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
