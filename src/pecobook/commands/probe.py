"""`pecobook probe`: how much a frozen network, or a tokenizer's codewords, know of the labels.

Nothing is chosen on the test images: regularisation and layer are chosen on a validation part of the training images.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pecobook.errors import ConfigError
from pecobook.settings.probe import ProbeConfig
from pecobook.settings.values import replace
from pecobook.utils.output_folder import check_new_file

if TYPE_CHECKING:
    from torch import Tensor

    from pecobook.commands.extract import Features


def probe(config: ProbeConfig | None = None, **settings: Any) -> dict[str, Any]:
    """Run both probes; prints a table and returns the figures (accuracies in percent).

    Raises:
        PecobookError: no labels, no such network, or a file that cannot be written.
    """
    from pecobook.commands.extract import extract
    from pecobook.data.images import check_labels, open_images

    config = replace(config or ProbeConfig(), settings)
    check_new_file(config.out)
    features, size = _open(config)
    splits = open_images(config.data)
    check_labels(splits, config.data)
    side = config.image_size or size
    train, train_labels = extract(splits.train, side, config.max_train, features, "features of training images")
    name = f"features of {splits.evaluation_name} images"
    test, test_labels = extract(splits.evaluation, side, config.max_test, features, name)
    assert train_labels is not None
    assert test_labels is not None
    results = probe_features(train, test, train_labels, test_labels, seed=config.seed)
    _show(results, len(splits.train.classes or ()))
    if config.out:
        from pecobook.utils.files import write_atomically

        shown = {kind: {k: v for k, v in result.items() if k != "correct"} for kind, result in results.items()}
        write_atomically(Path(config.out), (json.dumps(shown, indent=2) + "\n").encode())
    return results


def _open(config: ProbeConfig) -> tuple[Features, int]:
    """What turns images into named features, and the side of the images it takes."""
    import torch

    from pecobook.analysis.features import backbone_features, tokenizer_features
    from pecobook.models.export import read_export
    from pecobook.models.tokenizers import load_tokenizer
    from pecobook.models.weights import load_backbone

    if not config.backbone:
        raise ConfigError("--backbone is missing: give a run of pecobook, or timm:NAME.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    is_run = Path(config.backbone).is_dir() and read_export(config.backbone)[0].get("kind") == "tokenizer"
    if is_run or config.backbone.startswith(("dalle:", "diffusers:")):
        tokenizer = load_tokenizer(config.backbone).to(device)
        return lambda images: tokenizer_features(tokenizer, images.to(device)), tokenizer.image_size
    torch.manual_seed(config.seed)
    backbone = load_backbone(config.backbone, weights=config.weights or None, image_size=config.image_size or None)
    backbone.network.to(device)
    return lambda images: backbone_features(backbone, images, every_layer=True), backbone.image_size or 224


def probe_features(
    train: Mapping[str, Tensor], test: Mapping[str, Tensor], train_labels: Tensor, test_labels: Tensor, *, seed: int
) -> dict[str, dict[str, Any]]:
    """Linear probe and k-NN of the set of features, among several, that does best on a validation part of training.

    Where a set `... mean` has a set `... class` beside it, both together are tried too, as `... mean + class`.

    Args:
        train: name to (N, F) features of training images.
        test: the same of test images.
        train_labels: int64 (N,).
        test_labels: int64 (M,).
        seed: of the validation part.

    Returns:
        {"linear", "knn"}, each with accuracy and standard_error (percent), features (the chosen set), correct
        (M booleans) and, in linear, layers (name to validation accuracy).
    """
    from pecobook.analysis.probe import knn_probe, linear_probe, validation_accuracy

    sets = _sets(list(train))
    layers = {name: validation_accuracy(_joined(train, parts), train_labels, seed=seed) for name, parts in sets.items()}
    best = max(layers, key=lambda name: layers[name])
    own, other = (_joined(features, sets[best]) for features in (train, test))
    linear = linear_probe(own, train_labels, other, test_labels, seed=seed)
    knn = knn_probe(own, train_labels, other, test_labels)
    found = {
        kind: {**result.summary(), "features": best, "correct": result.correct.tolist()}
        for kind, result in (("linear", linear), ("knn", knn))
    }
    found["linear"]["layers"] = {name: round(value, 2) for name, value in layers.items()}
    return found


def _sets(names: list[str]) -> dict[str, list[str]]:
    """Every set by itself, and mean and class token of a layer together."""
    found = {name: [name] for name in names}
    for name in names:
        layer = name.removesuffix(" mean")
        if layer != name and f"{layer} class" in names:
            found[f"{layer} mean + class"] = [name, f"{layer} class"]
    return found


def _joined(features: Mapping[str, Tensor], names: list[str]) -> Tensor:
    import torch

    return torch.cat([features[name].float() for name in names], 1)


def _show(results: dict[str, dict[str, Any]], num_classes: int) -> None:
    layers = results["linear"]["layers"]
    if len(layers) > 1:
        _say("validation accuracy of a quick linear probe, by which the features are chosen:")
        for name, value in layers.items():
            _say(f"  {name:<24} {value:5.1f} %{'  <' if name == results['linear']['features'] else ''}")
    for name, result in results.items():
        _say(f"{name:<7} {result['accuracy']:.1f} ± {result['standard_error']:.1f} %   ({result['features']})")
    _say(f"{num_classes} classes, {len(results['linear']['correct']):,} held-out images")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
