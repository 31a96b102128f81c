"""Measurements of one tokenizer; all tokenizers encode the same images, each at its own image size.

Shapes: N images, codes int64 (N, h, w), K codewords.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pecobook.analysis.arrays import Array
from pecobook.analysis.atlas import Atlas
from pecobook.analysis.codewords import bag_of_codes, code_usage, matches, mean_codewords, query_points
from pecobook.analysis.figures import gallery_picture
from pecobook.analysis.position import information_given_position, moved_codes, opposite_halves, position_dependence
from pecobook.analysis.probe import MIN_IMAGES, linear_probe
from pecobook.analysis.reconstruction import decode_all, encode_all, float_parts, in_batches, psnr, ssim
from pecobook.analysis.semantics import information, patch_colours, patch_edges, patch_labels
from pecobook.analysis.similarity import agreement, code_distance, pixel_distance, read_bapps, shifted_preferred
from pecobook.analysis.stability import stability
from pecobook.commands.analyze.bank import Occurrences, bank_gallery, bank_usage, find_occurrences
from pecobook.commands.analyze.classifier import RestrictedClassifier
from pecobook.commands.analyze.inputs import AnalysisInputs, TokenizerInput
from pecobook.commands.analyze.pictures import (
    PATCHES,
    QUERIES,
    TokenizerMetrics,
    evenly_spaced,
    gallery_codewords,
    pictures_of,
)
from pecobook.commands.extract import extract_codes
from pecobook.data.stream import read_all
from pecobook.data.tokens import TokenBank
from pecobook.models.perceptual import PerceptualDistance
from pecobook.settings.analyze import AnalyzeConfig
from pecobook.utils.devices import device
from pecobook.utils.images import to_float
from pecobook.utils.printer import show

STABILITY_IMAGES = 500
"""Number of images that are compared with distorted and shifted copies."""
_SIMILARITY_IMAGES = 200  # images that are compared with shifted and blurred copies
PROBES = ("codeword_probe", "bag_probe", "crossed_probe", "crossed_bag_probe")
"""Names of the linear probes of codes."""
_BAG_VALUES = 2**29
"""Maximum number of values in the training features of a probe on bags of codes, 2 GB of memory."""
TrainCodes = Callable[[], tuple[Tensor, Tensor] | None]
"""Returns codes and labels of the training images, or None without labels."""


def evaluate_tokenizer(
    name: str,
    tokenizer: Any,
    images: Tensor,
    labels: Tensor | None,
    train: TrainCodes,
    distance: PerceptualDistance | None,
    *,
    larger: Tensor,
    seed: int,
    classifier: RestrictedClassifier | None = None,
) -> tuple[TokenizerMetrics, Tensor]:
    """Measure usage, reconstructions, dependence on the position, information and probe accuracy on held-out images.

    Args:
        name: name of the tokenizer.
        tokenizer: the tokenizer, which is moved to the device.
        images: held-out images, float (N, 3, S, S) in [0, 1] or uint8, with the tokenizer's image size.
        labels: labels of the images, int64 (N,), or None; without labels `train` is not called.
        train: returns codes and labels of training images.
        distance: perceptual distance between images and reconstructions; None omits this metric.
        larger: held-out images that are one token larger, float (M, 3, S + stride, S + stride).
        seed: seed of the probes' validation part, and of the codes that are permuted between positions.
        classifier: classifier of images and reconstructions; None omits this metric.

    Returns:
        the metrics, and the codes int64 (N, h, w) on the host.
    """
    tokenizer = tokenizer.to(device()).eval()
    K = tokenizer.num_codewords
    codes = encode_all(tokenizer, images)
    usage = code_usage(codes, K)
    values: dict[str, Any] = {
        "name": name,
        "num_codewords": K,
        "stride": tokenizer.stride,
        "image_size": tokenizer.image_size,
        "num_images": len(images),
        "codes_used": usage.codes_used,
        "perplexity": round(usage.perplexity, 2),
        "unused": at_most_fifty(np.flatnonzero(usage.counts == 0).tolist()),
        **_quality(tokenizer, images, codes, labels, distance, classifier),
    }
    dependence = dataclasses.asdict(position_dependence(codes, seed=seed))
    values["position"] = {key: _rounded(value, 4) for key, value in dependence.items()}
    moved = moved_codes(tokenizer, larger, tokenizer.stride)
    values["position"]["moved"] = {key: _rounded(value) for key, value in moved.items()}
    values["information"] = _information(seed, K, images, codes, labels)
    probe_values, correct = code_probes(tokenizer, codes, labels, train, seed)
    shown = evenly_spaced(len(images))
    originals = next(float_parts(images[shown]))
    restored = None if "predicts" in values else decode_all(tokenizer, codes[shown])
    same = matches(images, codes, query_points(len(images), QUERIES, seed=seed), seed=seed)
    return TokenizerMetrics(name, values | probe_values, originals, restored, usage, correct, same), codes


def _quality(
    tokenizer: Any,
    images: Tensor,
    codes: Tensor,
    labels: Tensor | None,
    distance: PerceptualDistance | None,
    classifier: RestrictedClassifier | None,
) -> dict[str, Any]:
    """Measure the reconstructions a few images at a time, since those of a whole data set would fill the memory.

    A tokenizer that predicts features has none, and `predicts` then says so.
    """
    if predicts := getattr(tokenizer, "predicts", ""):
        return {"predicts": predicts, "psnr": None, "ssim": None, "perceptual_distance": None}
    rows: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "distance": []}
    correct = {"originals": 0, "reconstructions": 0}
    done = 0
    for part, part_codes in zip(float_parts(images), torch.split(codes, 64), strict=True):
        restored = decode_all(tokenizer, part_codes)
        rows["psnr"].append(psnr(part, restored))
        rows["ssim"].append(ssim(part, restored))
        if distance is not None:
            rows["distance"].append(_distances(distance, part, restored))
        if classifier is not None and labels is not None:
            part_labels = labels[done : done + len(part)]
            correct["originals"] += classifier.num_correct(part, part_labels)
            correct["reconstructions"] += classifier.num_correct(restored, part_labels)
        done += len(part)
    values: dict[str, Any] = {
        "psnr": _rounded(torch.cat(rows["psnr"]).mean()),
        "ssim": _rounded(torch.cat(rows["ssim"]).mean(), 4),
        "perceptual_distance": None if distance is None else _rounded(torch.cat(rows["distance"]).mean(), 4),
    }
    if classifier is not None:
        shares = {name: round(100 * count / done, 3) for name, count in correct.items()}
        values["classifier"] = shares if labels is not None else dict.fromkeys(correct)
    return values


def analyze_tokenizer(
    config: AnalyzeConfig, tokenizer_input: TokenizerInput, inputs: AnalysisInputs
) -> tuple[TokenizerMetrics, list[str], Callable[[], tuple[dict[str, bytes], Atlas]]]:
    """Measure one tokenizer; return the metrics, the unreadable images, and a function that draws pictures by kind."""
    tokenizer, bank = tokenizer_input.tokenizer, tokenizer_input.bank
    images, labels, skipped = read_all(inputs.splits.evaluation, tokenizer.image_size, limit=config.max_test)
    limit = min(config.max_test, STABILITY_IMAGES)
    larger = to_float(read_all(inputs.splits.evaluation, tokenizer.image_size + tokenizer.stride, limit=limit)[0])
    show(f"  encoding and decoding {len(images)} images" + (f"; {len(skipped)} could not be read" if skipped else ""))
    train = partial(_train_codes, config, tokenizer_input, inputs)
    metrics, codes = evaluate_tokenizer(
        tokenizer_input.name,
        tokenizer,
        images,
        labels,
        train,
        inputs.distance,
        larger=larger,
        seed=config.seed,
        classifier=inputs.classifier,
    )
    K, values = tokenizer.num_codewords, metrics.values
    values["source"] = tokenizer_input.source
    show("  codes of distorted images")
    few = to_float(images[:STABILITY_IMAGES])
    unchanged = stability(tokenizer, few, codes[:STABILITY_IMAGES], tokenizer.stride)
    values["stability"] = {name: round(value, 2) for name, value in unchanged.items()}
    values["similarity"] = _similarity(inputs, tokenizer, few)
    occurrences: list[Occurrences] = []
    if bank is not None:
        show(f"  the token bank {bank.folder}")
        values["bank"], occurrences = _bank(config, bank, K)
    tokenizer.cpu()

    def draw() -> tuple[dict[str, bytes], Atlas]:
        classes, requested, seed = inputs.splits.evaluation.classes or (), config.codewords, config.seed
        usage = metrics.usage
        drawn, atlas = pictures_of(
            tokenizer, images, codes, labels, usage, classes=classes, requested=requested, seed=seed
        )
        if bank is not None:
            drawn["bank-gallery"] = gallery_picture(bank_gallery(bank, inputs.splits.train, occurrences))
        return drawn, atlas

    return metrics, skipped, draw


def at_most_fifty(codewords: list[int]) -> list[int] | None:
    """Return the codewords, or None for more than fifty, which nobody would read."""
    return codewords if len(codewords) <= 50 else None


def _bank(config: AnalyzeConfig, bank: TokenBank, num_codewords: int) -> tuple[dict[str, Any], list[Occurrences]]:
    """Measure usage over all training images; return it with the patches of a gallery."""
    usage = bank_usage(bank, num_codewords)
    chosen = gallery_codewords(usage, config.codewords, config.seed)
    values = {
        "folder": str(bank.folder),
        "num_images": bank.layouts["train"].num_images - len(bank.skipped),
        "num_views": bank.num_views,
        "codes_used": usage.codes_used,
        "perplexity": round(usage.perplexity, 2),
    }
    return values, find_occurrences(bank, chosen, num_codewords, patches=PATCHES, seed=config.seed)


def _rounded(value: Any, digits: int = 3) -> float | None:
    number = float(value)
    return round(number, digits) if np.isfinite(number) else None


@torch.inference_mode()
def _distances(distance: PerceptualDistance, x: Tensor, y: Tensor) -> Tensor:
    """Compute the perceptual distances of pairs of images (N, 3, S, S), float (N,) on the host."""
    return in_batches(lambda a, b: distance(a.to(device()), b.to(device())).cpu(), x, y)


def _train_codes(
    config: AnalyzeConfig, tokenizer_input: TokenizerInput, inputs: AnalysisInputs
) -> tuple[Tensor, Tensor] | None:
    train, tokenizer = inputs.splits.train, tokenizer_input.tokenizer
    if train.labels is None:
        return None
    codes, labels = extract_codes(
        tokenizer, train, tokenizer.image_size, config.max_train, f"codes of {tokenizer_input.name}"
    )
    assert labels is not None
    return codes, labels


def code_probes(
    tokenizer: Any, codes: Tensor, labels: Tensor | None, train: TrainCodes, seed: int
) -> tuple[dict[str, Any], dict[str, NDArray[np.bool_]]]:
    """Train linear probes on mean codewords and on bags of codes (paper, Table 4, left).

    The crossed probes are trained on the codes of one half of the positions and tested on the other half, so codes that
    are meaningful at a single position only do not help them. They need at least two positions in each half. Probes on
    bags learn from as many images as `_BAG_VALUES` allows, 65,536 for 8,192 codewords.

    Returns:
        the accuracies and their errors, which are None without labels (the errors also with fewer than `MIN_IMAGES`
        images), and which images were classified correctly.
    """
    values: dict[str, Any] = {f"{name}{suffix}": None for name in PROBES for suffix in ("", "_error")}
    values |= {"num_train": None, "num_train_bag": None}
    correct: dict[str, NDArray[np.bool_]] = {}
    training_set = train() if labels is not None else None
    if labels is None or training_set is None:
        return values, correct
    train_codes, train_labels = training_set
    num_bags = max(_BAG_VALUES // tokenizer.num_codewords, 1)
    mean = partial(mean_codewords, codebook=tokenizer.codebook.detach().float().cpu())
    bag = partial(bag_of_codes, num_codewords=tokenizer.num_codewords)
    plain, crossed = (train_codes, codes), opposite_halves(train_codes, codes)
    probes = [(mean, plain), (bag, plain)]
    if crossed is not None:
        probes += [(mean, crossed), (bag, crossed)]
    for name, (feature, (train_part, test_part)) in zip(PROBES, probes, strict=False):
        count = num_bags if feature is bag else len(train_labels)
        result = linear_probe(feature(train_part[:count]), train_labels[:count], feature(test_part), labels, seed=seed)
        values[name] = round(result.accuracy, 3)
        values[f"{name}_error"] = round(result.standard_error, 3) if len(labels) >= MIN_IMAGES else None
        correct[name] = result.correct
    return values | {"num_train": len(train_labels), "num_train_bag": min(num_bags, len(train_labels))}, correct


def _information(
    seed: int, num_codewords: int, images: Tensor, codes: Tensor, labels: Tensor | None
) -> dict[str, dict[str, float]]:
    """Measure the information in codes about classes (if there are labels), colours and edges, also given position."""
    grid = (codes.shape[1], codes.shape[2])
    values: dict[str, Array] = {} if labels is None else {"label": patch_labels(labels, grid)}
    values |= {"colour": patch_colours(images, grid), "edges": patch_edges(images, grid)}
    results = {}
    for kind, value in values.items():
        shares = dataclasses.asdict(information(codes, value, num_codewords, seed=seed))
        shares["given_position"] = information_given_position(codes, value, seed=seed)
        results[kind] = {name: round(share, 4) for name, share in shares.items()}
    return results


def _similarity(inputs: AnalysisInputs, tokenizer: Any, images: Tensor) -> dict[str, Any]:
    """Evaluate two-alternative judgements by pixels, by the tokenizer's codewords and by the perceptual distance."""
    distances: dict[str, Any] = {"pixels": pixel_distance, "codewords": code_distance(tokenizer)}
    if inputs.distance is not None:
        distances["perceptual"] = partial(_distances, inputs.distance)
    preferred = {name: round(shifted_preferred(images[:_SIMILARITY_IMAGES], d), 2) for name, d in distances.items()}
    values: dict[str, Any] = {"shifted_over_blurred": preferred}
    if inputs.judgements:
        triplets = read_bapps(inputs.judgements, tokenizer.image_size)
        values["agreement_with_people"] = {name: round(agreement(triplets, d), 2) for name, d in distances.items()}
        values["judgements"] = len(triplets.prefer_second)
    return values
