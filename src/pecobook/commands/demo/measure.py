"""Measures the demo's runs on held-out images: the metrics of `pecobook analyze`, and probes of the ViTs.

All runs are measured on the same fixed sample of the held-out split, so differences between the runs are paired.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pecobook.analysis.atlas import Atlas
from pecobook.analysis.features import backbone_features
from pecobook.analysis.probe import paired_difference
from pecobook.analysis.reconstruction import encode_all
from pecobook.commands.analyze.masked import predict
from pecobook.commands.analyze.measure import STABILITY_IMAGES, evaluate_tokenizer
from pecobook.commands.analyze.pictures import TokenizerMetrics, curves_of, pictures_of, side_by_side
from pecobook.commands.demo.plan import ARMS, PRETRAINED
from pecobook.commands.jobs import Job
from pecobook.commands.masked_run import load_masked_run
from pecobook.commands.probe import probe_features
from pecobook.data.source import Splits
from pecobook.data.stream import read_all
from pecobook.engine.value_range import open_readable
from pecobook.models.perceptual import PerceptualDistance
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.models.weights import Backbone, load_backbone
from pecobook.settings.demo import DemoConfig
from pecobook.utils.devices import device
from pecobook.utils.images import to_float
from pecobook.utils.json_files import last_evaluation
from pecobook.utils.printer import of_run

Probes = dict[str, dict[str, Any]]
"""The result of `probe_features`; empty without labels."""


class _Images(NamedTuple):
    train: Tensor
    train_labels: Tensor | None
    test: Tensor
    test_labels: Tensor | None
    larger: Tensor
    """Test images that are one token larger."""


def measure(config: DemoConfig, jobs: dict[str, Job]) -> tuple[dict[str, Any], dict[str, bytes], dict[str, Atlas]]:
    """Return the results, which contain the entries of `analysis.json` and more, pictures by file name, and atlases."""
    with of_run(quiet=True):  # everything worth reporting was printed before the runs
        splits = open_readable(config.data, config.value_range, [str(jobs["codebook-pixel"].out)])
    codebook = jobs["codebook-pixel"].config
    images = _read(splits, config, codebook.image_size, codebook.model.stride)
    measured, drawn, probes = _evaluate_all(config, jobs, images, splits.evaluation.classes or ())
    runs = {arm: load_masked_run(jobs[f"vit-{arm}"].out) for arm in PRETRAINED}
    predictions = predict(runs, splits.evaluation, config.seed)
    tokenizers = []
    pictures: dict[str, bytes] = {}
    for arm, metrics in measured.items():
        mim = _mim(jobs[f"vit-{arm}"], probes[arm]) if arm in PRETRAINED else None
        files = {kind: f"{kind}-{arm}.png" for kind in drawn[arm][0]}
        paths = {kind: f"pictures/{file}" for kind, file in files.items()}
        tokenizers.append({**metrics.values, "mim": mim, "pictures": paths})
        pictures |= {files[kind]: png for kind, png in drawn[arm][0].items()}
    pictures |= side_by_side(list(measured.values())) | predictions.draw()
    pictures |= curves_of("contrast", {"MoCo v3": str(jobs["contrast"].out)})
    pictures |= curves_of("tokenizers", {arm: str(jobs[f"codebook-{arm}"].out) for arm in ARMS})
    pictures |= curves_of("vits", {arm: str(jobs[f"vit-{arm}"].out) for arm in PRETRAINED})
    results = {
        "data": config.data,
        "seed": config.seed,
        "seconds": 0.0,
        "evaluation": splits.evaluation_name,
        "floor": {kind: _accuracy(probes["floor"], kind) for kind in ("linear", "knn")},
        "tokenizers": tokenizers,
        "num_train": len(images.train),
        "num_test": len(images.test),
        "num_classes": len(splits.train.classes or ()) if images.train_labels is not None else 0,
        "chance": None if (labels := images.test_labels) is None else _most_frequent(labels),
        "num_codewords": tokenizers[0]["num_codewords"],
        "comparisons": _comparisons(measured, probes),
        "masked_prediction": predictions.records,
    }
    return results, pictures, {arm: atlas for arm, (_, atlas) in drawn.items()}


def _read(splits: Splits, config: DemoConfig, size: int, stride: int) -> _Images:
    """Read all images at once, because every codebook and every ViT encodes them."""
    train, train_labels, _ = read_all(splits.train, size, limit=config.max_train)
    test, test_labels, _ = read_all(splits.evaluation, size, limit=config.max_test)
    if train_labels is None or test_labels is None:
        train_labels = test_labels = None
    larger, _, _ = read_all(splits.evaluation, size + stride, limit=min(config.max_test, STABILITY_IMAGES))
    return _Images(to_float(train), train_labels, to_float(test), test_labels, to_float(larger))


def _evaluate_all(
    config: DemoConfig, jobs: dict[str, Job], images: _Images, classes: Sequence[str]
) -> tuple[dict[str, TokenizerMetrics], dict[str, tuple[dict[str, bytes], Atlas]], dict[str, Probes]]:
    """Return metrics and pictures of each codebook, and the probes of each ViT and of an untrained ViT (the floor)."""
    perceptual = jobs["codebook-perceptual"].config.perceptual
    distance = PerceptualDistance(perceptual.network, perceptual.layers, normalisation=perceptual.normalisation)
    distance.to(device())  # the distance of the trained network, for all codebooks
    torch.manual_seed(config.seed)
    backbones = {"floor": load_backbone(jobs["vit-pixel"].config.out, weights="random")}
    backbones |= {arm: load_backbone(jobs[f"vit-{arm}"].config.out) for arm in PRETRAINED}
    # Two Python threads with one core each: the networks are small, and torch and SciPy release the GIL. Threads share
    # the filters of warnings, so the filter of the probe is set here again, around both threads.
    with warnings.catch_warnings(), ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")
        metric_futures = {
            arm: pool.submit(_evaluate_arm, arm, jobs[f"codebook-{arm}"], images, distance, config.seed) for arm in ARMS
        }
        probe_futures = {arm: pool.submit(_probes, backbones[arm], images, config.seed) for arm in backbones}
        results = {arm: future.result() for arm, future in metric_futures.items()}
        probes = {arm: future.result() for arm, future in probe_futures.items()}
    drawn = {
        arm: pictures_of(
            tokenizer, images.test, codes, images.test_labels, metrics.usage,
            classes=classes, requested=(), seed=config.seed,
        )
        for arm, (metrics, codes, tokenizer) in results.items()
    }  # fmt: skip
    return {arm: metrics for arm, (metrics, *_) in results.items()}, drawn, probes


def _evaluate_arm(
    arm: str, job: Job, images: _Images, distance: PerceptualDistance, seed: int
) -> tuple[TokenizerMetrics, Tensor, PerceptualTokenizer]:
    tokenizer = PerceptualTokenizer.from_pretrained(job.config.out)

    def train() -> tuple[Tensor, Tensor] | None:
        return None if images.train_labels is None else (encode_all(tokenizer, images.train), images.train_labels)

    metrics, codes = evaluate_tokenizer(
        arm, tokenizer, images.test, images.test_labels, train, distance, larger=images.larger, seed=seed
    )
    return metrics, codes, tokenizer


def _probes(backbone: Backbone, images: _Images, seed: int) -> Probes:
    """Evaluate linear probe and k-NN of a backbone; the result is empty without labels."""
    if images.train_labels is None or images.test_labels is None:
        return {}
    backbone.network.to(device())
    train, test = (backbone_features(backbone, split) for split in (images.train, images.test))
    return probe_features(train, test, images.train_labels, images.test_labels, seed=seed)


def _accuracy(probes: Probes, kind: str) -> float | None:
    return round(probes[kind]["accuracy"], 3) if probes else None


def _mim(job: Job, probes: Probes) -> dict[str, Any]:
    last = last_evaluation(job.out)
    of_position = last.get("accuracy_of_position")  # none for a single held-out image
    return {
        "loss": round(last["loss"], 4),
        "accuracy": round(last["accuracy"], 3),
        "accuracy_of_position": None if of_position is None else round(of_position, 3),
        "linear": _accuracy(probes, "linear"),
        "knn": _accuracy(probes, "knn"),
    }


def _comparisons(measured: dict[str, TokenizerMetrics], probes: dict[str, Probes]) -> list[dict[str, Any]]:
    """Return the paired differences in percentage points on the same held-out images."""
    metrics: dict[str, dict[str, Any]] = {
        kind: {arm: metrics.correct[kind] for arm, metrics in measured.items() if kind in metrics.correct}
        for kind in ("codeword_probe", "crossed_probe", "bag_probe")
    }
    metrics |= {
        f"mim.{kind}": {arm: p[kind]["correct"] for arm, p in probes.items() if p} for kind in ("linear", "knn")
    }
    comparisons = []
    for metric, arms in metrics.items():
        for second, first in itertools.combinations(arms, 2):
            difference, error = paired_difference(arms[first], arms[second])
            pair = {"metric": metric, "a": first, "b": second}
            comparisons.append({**pair, "difference": round(difference, 3), "standard_error": round(error, 3)})
    return comparisons


def _most_frequent(labels: Tensor) -> float:
    """Return the accuracy in percent of always predicting the most frequent class."""
    return round(100 * float(torch.bincount(labels).max()) / len(labels), 3)
