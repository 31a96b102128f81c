"""What the demo measures on held-out images, and its pictures.

N images, K codewords. Everything is computed on one fixed sample of the held-out split, the same for all arms, so
differences between arms are paired.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pecobook.analysis import figures
from pecobook.analysis.charts import code_usage_chart, read_metrics
from pecobook.analysis.codewords import Gallery, code_gallery, code_usage, mean_codewords
from pecobook.analysis.features import backbone_features
from pecobook.analysis.masked_prediction import decode_prediction, hide, predict_masked
from pecobook.analysis.probe import linear_probe, paired_difference
from pecobook.analysis.reconstruction import decode_all, encode_all, psnr
from pecobook.data.images import open_images
from pecobook.data.sampler import key
from pecobook.data.stream import read_all
from pecobook.demonstration.plan import ARMS, PRETRAINED
from pecobook.devices import device
from pecobook.jobs import Job
from pecobook.models.perceptual import PerceptualDistance
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.models.weights import Backbone, load_backbone
from pecobook.pixels import to_float
from pecobook.pretrained import load_masked_run
from pecobook.probing import probe_features
from pecobook.settings.codebook import CodebookConfig
from pecobook.settings.demo import DemoConfig
from pecobook.stages.pretrain import make_mask

Correct = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class _Images:
    train: Tensor
    train_labels: Tensor | None
    test: Tensor
    test_labels: Tensor | None
    num_classes: int


def measure(
    config: DemoConfig, jobs: dict[str, Job]
) -> tuple[dict[str, Any], dict[str, bytes], dict[str, dict[str, list[dict[str, Any]]]]]:
    """Results (the contract's and more), pictures by name, and training curves by title and run."""
    images = _read(config, jobs["codebook-pixel"].config.image_size)
    tokenizers = {arm: PerceptualTokenizer.from_pretrained(jobs[f"codebook-{arm}"].config.out) for arm in ARMS}
    distance = _distance(jobs["codebook-perceptual"])
    torch.manual_seed(config.seed)
    backbones = {"floor": load_backbone(jobs["vit-pixel"].config.out, weights="random")}
    backbones |= {arm: load_backbone(jobs[f"vit-{arm}"].config.out) for arm in PRETRAINED}
    # Two threads of Python, one core each: the networks are small, and torch and SciPy let go of the interpreter.
    # Filters of warnings are shared by threads, so the probe's own filter is set here once more, around both.
    with warnings.catch_warnings(), ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")
        looking = {arm: pool.submit(_look, tokenizers[arm], distance, images, config.seed) for arm in ARMS}
        probing = {arm: pool.submit(_probes, backbones[arm], images, config.seed) for arm in backbones}
        looks = {arm: future.result() for arm, future in looking.items()}
        probes = {arm: future.result() for arm, future in probing.items()}
    codebooks = []
    for arm in ARMS:
        mim = _mim(jobs[f"vit-{arm}"], probes[arm]) if arm in PRETRAINED else None
        codebooks.append({"name": arm, **looks[arm].figures, "mim": mim})
    pictures = {f"gallery:{arm}": figures.gallery_picture(look.gallery) for arm, look in looks.items()}
    shown = _spread(len(images.test))
    restored = {arm: look.restored[shown] for arm, look in looks.items()}
    pictures["reconstructions"] = figures.reconstruction_grid(images.test[shown], restored)
    pictures["usage"] = code_usage_chart({arm: look.counts for arm, look in looks.items()})
    pictures["masked_prediction"] = _masked_pictures(jobs, images.test[shown], config.seed)
    results = {
        "data": config.data,
        "seed": config.seed,
        "seconds": 0.0,
        "floor": {kind: _accuracy(probes["floor"], kind) for kind in ("linear", "knn")},
        "codebooks": codebooks,
        "num_train": len(images.train),
        "num_test": len(images.test),
        "num_classes": images.num_classes,
        "chance": _chance(images.test_labels),
        "num_codewords": tokenizers["pixel"].config.num_codewords,
        "comparisons": _comparisons(looks, probes),
    }
    return results, pictures, _curves(jobs)


def _read(config: DemoConfig, size: int) -> _Images:
    splits = open_images(config.data)
    train, train_labels, _ = read_all(splits.train, size, limit=config.max_train)
    test, test_labels, _ = read_all(splits.evaluation, size, limit=config.max_test)
    labelled = train_labels is not None and test_labels is not None
    return _Images(
        to_float(train),
        train_labels if labelled else None,
        to_float(test),
        test_labels if labelled else None,
        len(splits.train.classes or ()) if labelled else 0,
    )


@dataclasses.dataclass(frozen=True)
class _Look:
    """One tokenizer on the held-out images."""

    figures: dict[str, Any]
    restored: Tensor
    counts: Any
    gallery: Gallery
    correct: Correct | None


def _distance(job: Job) -> PerceptualDistance:
    """The trained network's distance, by which all arms are measured."""
    config = job.config
    assert isinstance(config, CodebookConfig)
    perceptual = config.perceptual
    distance = PerceptualDistance(perceptual.network, perceptual.layers, normalisation=perceptual.normalisation)
    return distance.to(device())


def _look(tokenizer: PerceptualTokenizer, distance: PerceptualDistance, images: _Images, seed: int) -> _Look:
    tokenizer = tokenizer.to(device())
    codes = encode_all(tokenizer, images.test).cpu()
    restored = decode_all(tokenizer, codes.to(device())).cpu()
    usage = code_usage(codes, tokenizer.config.num_codewords)
    score, correct = None, None
    if images.train_labels is not None and images.test_labels is not None:
        # Average-pooled codewords: paper, Table 4.
        train = mean_codewords(encode_all(tokenizer, images.train).cpu(), tokenizer.codebook.cpu())
        test = mean_codewords(codes, tokenizer.codebook.cpu())
        result = linear_probe(train, images.train_labels, test, images.test_labels, seed=seed)
        score, correct = round(result.accuracy, 3), result.correct
    shown = {
        "codes_used": usage.codes_used,
        "perplexity": round(usage.perplexity, 2),
        "psnr": round(float(psnr(images.test, restored).mean()), 3),
        "perceptual_distance": round(_mean_distance(distance, images.test, restored), 4),
        "codeword_probe": score,
    }
    return _Look(shown, restored, usage.counts, code_gallery(images.test, codes, seed=seed), correct)


@torch.inference_mode()
def _mean_distance(distance: PerceptualDistance, images: Tensor, restored: Tensor) -> float:
    pairs = zip(torch.split(images, 256), torch.split(restored, 256), strict=True)
    where = device()
    return float(torch.cat([distance(x.to(where), y.to(where)).cpu() for x, y in pairs]).mean())


def _probes(backbone: Backbone, images: _Images, seed: int) -> dict[str, dict[str, Any]]:
    """Linear probe and k-NN of a backbone; empty without labels."""
    if images.train_labels is None or images.test_labels is None:
        return {}
    backbone.network.to(device())
    train, test = (backbone_features(backbone, split) for split in (images.train, images.test))
    return probe_features(train, test, images.train_labels, images.test_labels, seed=seed)


def _accuracy(probes: dict[str, dict[str, Any]], kind: str) -> float | None:
    return round(probes[kind]["accuracy"], 3) if probes else None


def _mim(job: Job, probes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    logged = [record for record in read_metrics(Path(job.config.out) / "metrics.jsonl") if "evaluation/loss" in record]
    return {
        "loss": round(logged[-1]["evaluation/loss"], 4),
        "accuracy": round(logged[-1]["evaluation/accuracy"], 3),
        "linear": _accuracy(probes, "linear"),
        "knn": _accuracy(probes, "knn"),
    }


def _spread(count: int, rows: int = 6) -> Tensor:
    """Indices of the images to show: evenly through the split, which is often sorted by class."""
    return torch.linspace(0, count - 1, min(rows, count)).long()


def _masked_pictures(jobs: dict[str, Job], shown: Tensor, seed: int) -> bytes:
    decoded, masked = {}, shown
    for arm in PRETRAINED:
        run = load_masked_run(jobs[f"vit-{arm}"].config.out).to(device())
        mask = torch.stack([make_mask(key(seed, row), run.grid, run.config.mask) for row in range(len(shown))])
        decoded[arm] = decode_prediction(run, predict_masked(run, run, shown, mask))
        masked = hide(shown, mask)
    return figures.masked_prediction_grid(shown, masked, decoded)


def _comparisons(looks: dict[str, _Look], probes: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Paired differences, in percent points, on the same held-out images."""
    metrics: dict[str, dict[str, Any]] = {
        "codeword_probe": {arm: look.correct for arm, look in looks.items() if look.correct is not None},
        **{f"mim.{kind}": {arm: p[kind]["correct"] for arm, p in probes.items() if p} for kind in ("linear", "knn")},
    }
    found = []
    for metric, arms in metrics.items():
        for second, first in itertools.combinations(arms, 2):
            difference, error = paired_difference(arms[first], arms[second])
            pair = {"metric": metric, "a": first, "b": second}
            found.append({**pair, "difference": round(difference, 3), "standard_error": round(error, 3)})
    return found


def _chance(labels: Tensor | None) -> float | None:
    """Percent right by always naming the most frequent class."""
    if labels is None:
        return None
    return round(100 * float(torch.bincount(labels).max()) / len(labels), 3)


def _curves(jobs: dict[str, Job]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    titles = {"contrast": "Feature network", "codebook": "Codebooks", "pretrain": "Vision transformers"}
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, job in jobs.items():
        arm = name.partition("-")[2] or "MoCo v3"
        records = [record for record in read_metrics(Path(job.config.out) / "metrics.jsonl") if "loss" in record]
        curves.setdefault(titles[job.command], {})[arm] = records
    return curves
