"""`pecobook probe`: how well a linear probe and k-NN on frozen features predict the labels.

The features come from a backbone or from a tokenizer's codewords. Nothing is chosen on the test images: the
regularisation and the layer are chosen on a validation part of the training images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pecobook.analysis.codewords import bag_of_codes, mean_codewords
from pecobook.analysis.features import EveryLayer, backbone_features, pools_class_token
from pecobook.analysis.position import opposite_halves, position_dependence
from pecobook.analysis.probe import (
    MIN_IMAGES,
    VALIDATION_SHARE,
    ProbeResult,
    knn_probe,
    linear_probe,
    validation_accuracy,
)
from pecobook.analysis.wording import accuracy_with_error
from pecobook.commands.extract import (
    FeatureFunction,
    check_reads,
    extract,
    extract_codes,
    names_tokenizer,
    open_backbone,
)
from pecobook.data.images import check_labels
from pecobook.data.source import Splits
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

Results = dict[str, dict[str, Any]]
"""What `probe_features` returns."""
_POSITION_IMAGES = 2000  # held-out images whose codes are compared with their positions
_EVERY_LAYER = 100_000
"""Number of training images up to which the features of every layer are kept, 4 GB for a ViT-B. With more images, this
many choose the layer, and only the best layer's features are kept for all of them."""


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
    measure = _of_tokenizer if names_tokenizer(config.backbone) else _of_backbone
    results, num_train, remarks = measure(config, splits)
    show(_table(results, len(splits.train.classes or ()), num_train) + remarks)
    if config.out:
        without_images = {
            probe: {key: value for key, value in result.items() if key != "correct"}
            for probe, result in results.items()
        }
        write_json(Path(config.out), without_images)
    return results


def _of_backbone(config: ProbeConfig, splits: Splits) -> tuple[Results, int, str]:
    """Return the results, the number of training images, and remarks."""
    backbone, size = open_backbone(config, config.seed)
    if getattr(backbone.network, "cls_token", None) is not None and not pools_class_token(backbone.network):
        say(
            f"{config.backbone} pools the mean of its patches, which is read of every block; its class token is left "
            "out, since its output was not trained."
        )
    check_reads(EveryLayer(backbone.network), size, config.backbone)
    show_source(splits)
    features: FeatureFunction = partial(backbone_features, backbone, every_layer=True)
    seed, layers = config.seed, None
    if min(config.max_train, len(splits.train)) > _EVERY_LAYER:
        few, labels = extract(splits.train, size, _EVERY_LAYER, features, "features of every layer")
        assert labels is not None
        layers = layer_accuracies(few, labels, seed=seed)
        del few
        features = partial(_only, features, _feature_sets(list(layers))[_best(layers)])
    train, labels = extract(splits.train, size, config.max_train, features, "features of training images")
    test, test_labels = extract(splits.evaluation, size, config.max_test, features, "features of held-out images")
    assert labels is not None
    assert test_labels is not None
    return probe_features(train, test, labels, test_labels, seed=seed, layers=layers), len(labels), ""


def _of_tokenizer(config: ProbeConfig, splits: Splits) -> tuple[Results, int, str]:
    """Return the results, the number of training images, and a sentence on the position."""
    tokenizer = load_tokenizer(config.backbone).to(device())
    show_source(splits)
    size, seed = config.image_size or tokenizer.image_size, config.seed
    train, labels = extract_codes(tokenizer, splits.train, size, config.max_train, "codes of training images")
    test, test_labels = extract_codes(tokenizer, splits.evaluation, size, config.max_test, "codes of held-out images")
    assert labels is not None
    assert test_labels is not None
    codebook = tokenizer.codebook.detach().float().cpu()
    few = {name: feature(train[:_EVERY_LAYER], codebook) for name, feature in _OF_CODES.items()}
    layers = layer_accuracies(few, labels[:_EVERY_LAYER], seed=seed)
    del few
    best = _best(layers)
    of_train, of_test = ({best: _OF_CODES[best](codes, codebook)} for codes in (train, test))
    results = probe_features(of_train, of_test, labels, test_labels, seed=seed, layers=layers)
    if (halves := opposite_halves(train, test)) is not None:
        crossed_train, crossed_test = (mean_codewords(codes, codebook) for codes in halves)
        crossed = linear_probe(crossed_train, labels, crossed_test, test_labels, seed=seed)
        results["crossed"] = _entry(crossed, "mean codeword, position removed")
    position = position_dependence(test[:_POSITION_IMAGES], seed=seed)
    remarks = (
        f"\nA code contains {100 * position.share:.1f}% of the information about its position in the image, "
        f"permuted codes {100 * position.null_share:.1f}%."
    )
    return results, len(labels), remarks


def _bags(codes: Tensor, codebook: Tensor) -> Tensor:
    """Return bags of codes in half precision, a few images at a time, since those of all might not fit into memory."""
    return torch.cat([bag_of_codes(part, len(codebook)).half() for part in torch.split(codes, 2**14)])


_OF_CODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean codeword": mean_codewords, "bag of codes": _bags}
"""Features of a tokenizer's codes int (N, h, w) and codebook (K, D)."""


def _best(layers: Mapping[str, float]) -> str:
    return max(layers, key=lambda name: layers[name])


def _entry(result: ProbeResult, features: str) -> dict[str, Any]:
    return {**result.summary(), "features": features, "correct": result.correct.tolist()}


def _only(features: FeatureFunction, names: list[str], images: Tensor) -> dict[str, Tensor]:
    found = features(images)
    return {name: found[name] for name in names}


def layer_accuracies(train: Mapping[str, Tensor], labels: Tensor, *, seed: int) -> dict[str, float]:
    """Return each feature set's accuracy, and that of pairs, on a validation part of training; see `probe_features`.

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
) -> Results:
    """Choose the best of several feature sets on a validation part of training, and run both probes on it.

    If a set `... mean` has a matching set `... class`, their concatenation `... mean + class` is a candidate too.

    Args:
        train: features (N, F) of the training images by name of the set.
        test: features (M, F) of the test images by name of the set.
        train_labels: int64 (N,).
        test_labels: int64 (M,).
        seed: seed of the validation part.
        layers: result of an earlier call of `layer_accuracies`; None calls it here.

    Returns:
        {"linear", "knn"}, each with accuracy and standard_error (percent), features (the chosen set), correct
        (M booleans) and, in linear, layers (name to validation accuracy).
    """
    layers = layer_accuracies(train, train_labels, seed=seed) if layers is None else layers
    best = _best(layers)
    parts = _feature_sets(list(train))[best]
    best_train, best_test = (_concatenated(features, parts) for features in (train, test))
    linear = linear_probe(best_train, train_labels, best_test, test_labels, seed=seed)
    knn = knn_probe(best_train, train_labels, best_test, test_labels)
    results = {"linear": _entry(linear, best), "knn": _entry(knn, best)}
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


def _table(results: Results, num_classes: int, num_train: int) -> str:
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
