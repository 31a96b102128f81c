"""`pecobook probe`: how well a linear probe and k-NN on frozen features predict the labels.

The features come from a backbone or from the codewords of a tokenizer. No choice is made on the test images: the
regularisation and the layer are chosen on a validation part of the training images.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pecobook.analysis.codewords import mean_codewords
from pecobook.analysis.features import CODES, EveryLayer, backbone_features, pools_class_token, tokenizer_features
from pecobook.analysis.position import checkerboard, position_dependence
from pecobook.analysis.probe import MIN_IMAGES, VALIDATION_SHARE, knn_probe, linear_probe, validation_accuracy
from pecobook.analysis.wording import accuracy_with_error
from pecobook.commands.extract import FeatureFunction, check_reads, extract, names_tokenizer, open_backbone
from pecobook.data.images import check_labels
from pecobook.engine.preamble import show_source
from pecobook.engine.value_range import open_readable
from pecobook.errors import DataError
from pecobook.models.tokenizers import load_tokenizer
from pecobook.settings.probe import ProbeConfig
from pecobook.settings.values import replace
from pecobook.utils.devices import device
from pecobook.utils.extras import require
from pecobook.utils.files import write_json
from pecobook.utils.output_folder import check_new_file
from pecobook.utils.printer import say, show

_POSITION_IMAGES = 2000  # held-out images whose codes are compared with their positions
_EVERY_LAYER = 100_000
"""Training images up to which the features of every layer are kept, 4 GB for a ViT-B. Of more images so many choose the
layer, and those of the best layer alone are kept of all."""


def probe(config: ProbeConfig | None = None, **settings: Any) -> dict[str, Any]:
    """Run both probes, print a table, and return the results (accuracies in percent).

    Raises:
        PecobookError: the images have no labels, the network does not exist, or the file cannot be written.
    """
    config = replace(config or ProbeConfig(), settings)
    require("analysis", "pecobook probe")
    check_new_file(config.out)
    splits = open_readable(config.data, config.value_range, [config.backbone])
    try:
        check_labels(splits, config.data)
    except DataError as error:
        raise DataError(f"{error}\nWithout labels, pecobook embed writes the features to a file.") from None
    features, image_size = _feature_function(config)  # may download weights, so the images are checked first
    show_source(splits)
    size, layers = config.image_size or image_size, None
    if min(config.max_train, len(splits.train)) > _EVERY_LAYER:
        few, labels = extract(splits.train, size, _EVERY_LAYER, features, "features of every layer")
        assert labels is not None
        kept = [CODES] if few.pop(CODES, None) is not None else []
        layers = layer_accuracies(few, labels, seed=config.seed)
        del few
        best = max(layers, key=lambda name: layers[name])
        features = partial(_only, features, [*_feature_sets(list(layers))[best], *kept])
    train, train_labels = extract(splits.train, size, config.max_train, features, "features of training images")
    test, test_labels = extract(splits.evaluation, size, config.max_test, features, "features of held-out images")
    assert train_labels is not None
    assert test_labels is not None
    train_codes, test_codes = train.pop(CODES, None), test.pop(CODES, None)
    results = probe_features(train, test, train_labels, test_labels, seed=config.seed, layers=layers)
    remarks = ""
    if train_codes is not None and test_codes is not None:
        codebook = load_tokenizer(config.backbone).codebook.detach().float().cpu()
        results |= crossed(train_codes, test_codes, train_labels, test_labels, codebook, seed=config.seed)
        position = position_dependence(test_codes[:_POSITION_IMAGES])
        remarks = (
            f"\nA code contains {100 * position.share:.1f}% of the information about its position in the image, "
            f"permuted codes {100 * position.null_share:.1f}%."
        )
    show(_table(results, len(splits.train.classes or ()), len(train_labels)) + remarks)
    if config.out:
        without_images = {
            probe: {key: value for key, value in result.items() if key != "correct"}
            for probe, result in results.items()
        }
        write_json(Path(config.out), without_images)
    return results


def _feature_function(config: ProbeConfig) -> tuple[FeatureFunction, int]:
    """Return the function that maps images to named features, and the side of its input images, pixels."""
    if names_tokenizer(config.backbone):
        tokenizer = load_tokenizer(config.backbone).to(device())
        return lambda images: tokenizer_features(tokenizer, images.to(device())), tokenizer.image_size
    backbone, size = open_backbone(config, config.seed)
    if getattr(backbone.network, "cls_token", None) is not None and not pools_class_token(backbone.network):
        say(
            f"{config.backbone} pools the mean of its patches, which is read of every block; its class token is left "
            "out, since its output was not trained."
        )
    check_reads(EveryLayer(backbone.network), size, config.backbone)
    return lambda images: backbone_features(backbone, images, every_layer=True), size


def crossed(
    train: Tensor, test: Tensor, train_labels: Tensor, test_labels: Tensor, codebook: Tensor, *, seed: int
) -> dict[str, dict[str, Any]]:
    """Run the linear probe of mean codewords with position removed, as `pecobook analyze` does.

    Codes int (N, h, w) of one half of the positions train it, those of the other half test it, so codes that are bound
    to one position do not help.

    Returns:
        {"crossed"}, as a probe of `probe_features`; empty for fewer than two positions in a half.
    """
    half = checkerboard((train.shape[1], train.shape[2]))
    if min(int(half.sum()), int((~half).sum())) < 2:
        return {}
    trained, tested = (mean_codewords(codes, codebook) for codes in (train[:, half], test[:, ~half]))
    result = linear_probe(trained, train_labels, tested, test_labels, seed=seed)
    features = "mean codeword, position removed"
    return {"crossed": {**result.summary(), "features": features, "correct": result.correct.tolist()}}


def _only(features: FeatureFunction, names: list[str], images: Tensor) -> dict[str, Tensor]:
    found = features(images)
    return {name: found[name] for name in names}


def layer_accuracies(train: Mapping[str, Tensor], labels: Tensor, *, seed: int) -> dict[str, float]:
    """Return the accuracy on a validation part of training of each set of features, and of pairs; see `probe_features`.

    `train` maps the name of a set to features (N, F), `labels` is int64 (N,).
    """
    sets = _feature_sets(list(train))
    return {name: validation_accuracy(_concatenated(train, parts), labels, seed=seed) for name, parts in sets.items()}


def probe_features(
    train: Mapping[str, Tensor],
    test: Mapping[str, Tensor],
    train_labels: Tensor,
    test_labels: Tensor,
    *,
    seed: int,
    layers: dict[str, float] | None = None,
) -> dict[str, dict[str, Any]]:
    """Choose the best of several sets of features on a validation part of training, and run both probes on it.

    Where there is a set `... class` for a set `... mean`, their concatenation `... mean + class` is a candidate too.

    Args:
        train: name of a set to features (N, F) of the training images.
        test: name of a set to features (M, F) of the test images.
        train_labels: int64 (N,).
        test_labels: int64 (M,).
        seed: seed of the validation part.
        layers: result of `layer_accuracies`, where the best was chosen before; None chooses here.

    Returns:
        {"linear", "knn"}, each with accuracy and standard_error (percent), features (the chosen set), correct
        (M booleans) and, in linear, layers (name to validation accuracy).
    """
    layers = layer_accuracies(train, train_labels, seed=seed) if layers is None else layers
    best = max(layers, key=lambda name: layers[name])
    parts = _feature_sets(list(train))[best]
    best_train, best_test = (_concatenated(features, parts) for features in (train, test))
    linear = linear_probe(best_train, train_labels, best_test, test_labels, seed=seed)
    knn = knn_probe(best_train, train_labels, best_test, test_labels)
    results = {
        name: {**result.summary(), "features": best, "correct": result.correct.tolist()}
        for name, result in (("linear", linear), ("knn", knn))
    }
    results["linear"]["layers"] = {name: round(value, 2) for name, value in layers.items()}
    return results


def _feature_sets(names: list[str]) -> dict[str, list[str]]:
    """Return every set alone, and for each layer the patch mean together with the class token."""
    sets = {name: [name] for name in names}
    for name in names:
        layer = name.removesuffix(" mean")
        if layer != name and f"{layer} class" in names:
            sets[f"{layer} mean + class"] = [name, f"{layer} class"]
    return sets


def _concatenated(features: Mapping[str, Tensor], names: list[str]) -> Tensor:
    return features[names[0]] if len(names) == 1 else torch.cat([features[name] for name in names], 1)


def _table(results: dict[str, dict[str, Any]], num_classes: int, num_train: int) -> str:
    layers, lines = results["linear"]["layers"], []
    if len(layers) > 1:
        number = VALIDATION_SHARE * num_train
        few = f" (on about {number:.0f} images, too few for any claim)" if number < MIN_IMAGES else ""
        lines.append(f"validation accuracy of a quick linear probe, by which the features are chosen{few}:")
        for name, value in layers.items():
            lines.append(f"  {name:<24} {value:5.1f} %{'  <' if name == results['linear']['features'] else ''}")
    number = len(results["linear"]["correct"])
    for name, result in results.items():
        low, high = result["interval_95"]
        text = f"{accuracy_with_error(result['accuracy'], number)}{' %' if number >= MIN_IMAGES else ' right'}"
        lines.append(f"{name:<7} {text}   (95% interval {low:.1f} to {high:.1f} %; {result['features']})")
    lines.append(f"{num_classes} classes, {number:,} held-out image{'s' if number > 1 else ''}")
    if number < MIN_IMAGES:
        lines.append(f"Fewer than {MIN_IMAGES} held-out images are too few for an accuracy in percent.")
    return "\n".join(lines)
