"""Linear probe and k-NN classification of frozen features.

Shapes: N images, D features, C classes. Features are float (N, D), labels int (N,), from NumPy or torch. Both probes
record which test images they classified correctly, so that the accuracies of two probes on the same images can be
compared in pairs: the standard error of `paired_difference` is far smaller than that of two independent accuracies.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pecobook.analysis.arrays import Array, as_numpy
from pecobook.analysis.logistic import LogisticRegression
from pecobook.errors import DataError
from pecobook.utils.devices import device

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse regularisation strengths that the linear probe tries, strongest regularisation first."""
VALIDATION_SHARE = 0.15
"""Share of the training images on which the regularisation and the features are chosen."""
MIN_IMAGES = 20
"""Minimum number of test images for an accuracy in percent; with fewer images reports give only counts."""
_MAX_ITER = 200
_LARGE = 2**27
"""Number of values, images times features, above which a linear probe reads its training features in parts: 0.5 GB."""
_PART = 2**25
"""Number of values in a part: 0.13 GB in fp32."""


@dataclass(frozen=True)
class ProbeResult:
    """The result of one probe on the test images."""

    accuracy: float
    """Percentage of test images classified correctly."""
    standard_error: float
    """Sampling error of `accuracy` in percentage points (`binomial_error`), without the variation between seeds."""
    setting: dict[str, float]
    """The chosen and the fixed settings, for example `{"C": 0.01, "search_images": 10000}` or `{"k": 20}`."""
    validation_accuracy: float | None
    """Accuracy in percent on the validation part that chose the setting; None if nothing was chosen."""
    correct: NDArray[np.bool_] = field(repr=False)
    """(number of test images,) True where the prediction was correct, in the order of the test images."""

    def summary(self) -> dict[str, Any]:
        """Return the result as JSON values, without the results per image."""
        validation = None if self.validation_accuracy is None else round(self.validation_accuracy, 3)
        return {
            "accuracy": round(self.accuracy, 3),
            "standard_error": round(self.standard_error, 3),
            "interval_95": [round(end, 3) for end in wilson_interval(self.accuracy, len(self.correct))],
            "setting": self.setting,
            "validation_accuracy": validation,
        }


def linear_probe(
    train_x: Array,
    train_y: Array,
    test_x: Array,
    test_y: Array,
    *,
    seed: int = 0,
    search_images: int = 10_000,
) -> ProbeResult:
    """Fit a multinomial logistic regression on standardised features and evaluate it on the test images.

    The inverse regularisation C is the value of `C_GRID` with the best accuracy on a stratified 15% of the training
    images (ties go to the stronger regularisation); the probe is then fitted again on all training images. The test
    images do not influence this choice. At most `search_images` training images, drawn with `seed`, are used for the
    choice, because all five fits on 38,000 x 192 features and 100 classes would take minutes on two cores. The number
    of images and the iterations of the last fit are recorded in `setting`. Test images of a class that does not occur
    in the training images count as wrong. More than `_LARGE` training features are read in parts, so that memory beyond
    them stays below a gigabyte (`pecobook.analysis.logistic`).
    """
    train, train_y = _checked("training", train_x, train_y)
    test, test_y = _checked("test", test_x, test_y)
    rng = np.random.default_rng(seed)
    c, validation, searched = _choose_c(train, train_y, rng, C_GRID, search_images, _MAX_ITER)
    mean, scale = _moments(train)
    model: Any
    if train.size > _LARGE and train_y.min() != train_y.max():
        model = LogisticRegression(
            lambda rows: (train[rows] - mean) / scale, train_y, train.shape[1], c=c, max_iter=_MAX_ITER
        )
        predicted = model.predict(lambda rows: (test[rows] - mean) / scale, len(test))
    else:
        model = _fit(_logistic_regression(_MAX_ITER), (train[:] - mean) / scale, train_y, c)
        predicted = model.predict((test[:] - mean) / scale)
    iterations = int(np.max(getattr(model, "n_iter_", 0)))
    setting = {"C": c, "search_images": searched, "iterations": iterations, "max_iter": _MAX_ITER}
    return _result(predicted == test_y, setting, validation)


def validation_accuracy(x: Array, y: Array, *, seed: int = 0) -> float:
    """Return the accuracy in percent on a stratified 15% of at most 4,000 training images.

    This is a fast estimate for choosing features. The best of three regularisation strengths counts. The result is NaN
    if no class has enough images for the validation part.
    """
    features, y = _checked("training", x, y)
    _, accuracy, _ = _choose_c(features, y, np.random.default_rng(seed), (1e-3, 1e-2, 1e-1), 4000, 100)
    return float("nan") if accuracy is None else accuracy


def knn_probe(
    train_x: Array,
    train_y: Array,
    test_x: Array,
    test_y: Array,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 512,
    tile: int = 2**16,
) -> ProbeResult:
    """Classify by a weighted vote of the k nearest neighbours in cosine similarity, as DINO does (arXiv 2104.14294).

    A neighbour at similarity s votes for its class with weight exp(s / temperature). k is at most the number of
    training images. A `chunk` of test images is compared with a `tile` of training images at a time, so memory beyond
    the features is that of a tile in fp32, chunk x tile similarities, and k neighbours of each test image.
    """
    if k < 1 or temperature <= 0:
        raise ValueError(f"knn_probe needs k >= 1 and temperature > 0, got k={k}, temperature={temperature}")
    train, train_y = _checked("training", train_x, train_y)
    test, test_y = _checked("test", test_x, test_y)
    k = min(k, len(train_y))
    classes, position = np.unique(train_y, return_inverse=True)
    labels = torch.from_numpy(position.reshape(-1).astype(np.int64))
    nearest = _neighbours(train, test, k, chunk=chunk, tile=tile)
    predicted = np.empty(len(test_y), dtype=np.int64)
    for start in range(0, len(test_y), chunk):
        similarity, index = (part[start : start + chunk] for part in nearest)
        # Subtracting 1, the maximum cosine, does not change the order of the votes and prevents overflow.
        weight = torch.exp((similarity.double() - 1) / temperature)
        votes = torch.zeros(len(index), len(classes), dtype=torch.float64).scatter_add_(1, labels[index], weight)
        predicted[start : start + chunk] = votes.argmax(dim=1).numpy()
    return _result(classes[predicted] == test_y, {"k": k, "temperature": temperature}, None)


def _neighbours(train: _Features, test: _Features, k: int, *, chunk: int, tile: int) -> tuple[Tensor, Tensor]:
    """Return the largest cosine similarities, float (M, k), and their indices, int64 (M, k), on the host."""
    place, best, tile = device(), list[tuple[Tensor, Tensor]](), min(tile, max(_PART // train.shape[1], 1))
    for first in range(0, len(train), tile):
        bank = torch.nn.functional.normalize(torch.from_numpy(train[first : first + tile]).to(place), dim=1)
        for number, start in enumerate(range(0, len(test), chunk)):
            queries = torch.from_numpy(test[start : start + chunk]).to(place)
            similarity = torch.nn.functional.normalize(queries, dim=1) @ bank.T
            values, index = similarity.topk(min(k, len(bank)), dim=1)  # (b, k) each
            index += first
            if first == 0:
                best.append((values, index))
                continue
            values, index = (torch.cat(pair, 1) for pair in zip(best[number], (values, index), strict=True))
            values, chosen = values.topk(min(k, values.shape[1]), dim=1)
            best[number] = values, index.gather(1, chosen)
    values, index = (torch.cat(parts).cpu() for parts in zip(*best, strict=True))
    return values, index


def paired_difference(correct_a: Array, correct_b: Array) -> tuple[float, float]:
    """Return the accuracy of a minus the accuracy of b, and the standard error of the difference, in percentage points.

    Both arrays are bool (number of test images,) for the same images in the same order (`ProbeResult.correct`). The
    error is that of McNemar's test, so images on which a and b agree do not increase it, with half an image added to
    each of the four combinations (Agresti and Min, 2005): a and b that agree on few images have an error above 0.
    """
    a, b = as_numpy(correct_a).astype(np.float64), as_numpy(correct_b).astype(np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"paired_difference needs two equally long, non-empty rows, got {a.shape} and {b.shape}")
    only_a, only_b = int((a > b).sum()), int((b > a).sum())
    number = len(a) + 2
    variance = (only_a + only_b + 1 - (only_a - only_b) ** 2 / number) / number**2
    return 100 * (only_a - only_b) / len(a), 100 * math.sqrt(variance)


def binomial_error(accuracy: float, number: int) -> float:
    """Return one standard error of sampling, in percentage points, of an `accuracy` in percent on `number` images.

    This is half the width of Wilson's interval, so it is above 0 even if all or none of the images are right.
    """
    low, high = wilson_interval(accuracy, number, errors=1)
    return (high - low) / 2


def wilson_interval(accuracy: float, number: int, *, errors: float = 1.96) -> tuple[float, float]:
    """Return Wilson's interval, in percent, of an `accuracy` in percent on `number` images.

    Args:
        accuracy: share of the images that are right, in percent.
        number: number of images.
        errors: half the width of the interval in standard errors; 1.96 gives 95% confidence.
    """
    share = min(max(accuracy / 100, 0.0), 1.0)
    square = errors**2 / number
    centre = share + square / 2
    half = math.sqrt(square * (share * (1 - share) + square / 4))
    return 100 * max(centre - half, 0.0) / (1 + square), 100 * min((centre + half) / (1 + square), 1.0)


class _Features:
    """Features (N, D), whose rows are converted to float32 when they are read."""

    def __init__(self, values: Array) -> None:
        self._values = values.detach() if isinstance(values, Tensor) else values
        self.shape = tuple(values.shape)

    def __len__(self) -> int:
        return int(self.shape[0])

    @property
    def size(self) -> int:
        """N D."""
        return math.prod(self.shape)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        chosen = torch.from_numpy(rows) if isinstance(rows, np.ndarray) and isinstance(self._values, Tensor) else rows
        return as_numpy(self._values[chosen]).astype(np.float32, copy=False)

    def parts(self) -> Iterator[NDArray[np.float32]]:
        """Yield the rows in order, a few at a time, since some callers hold them twice in fp64."""
        step = max(_PART // self.shape[1], 1)
        for start in range(0, len(self), step):
            yield self[start : start + step]


def _checked(part: str, x: Array, y: Array) -> tuple[_Features, NDArray[np.int64]]:
    """Return features (N, D) and labels int64 (N,). Raises DataError for other shapes and for NaN."""
    features, labels = _Features(x), as_numpy(y).astype(np.int64)
    if len(features.shape) != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
        raise DataError(
            f"A probe needs features (N, D) and labels (N,) with N > 0; the {part} part has features "
            f"{features.shape} and labels {labels.shape}."
        )
    if not all(np.isfinite(rows).all() for rows in features.parts()):
        raise DataError(f"The {part} features of a probe contain NaN or infinity: the network diverged.")
    return features, labels


def _logistic_regression(max_iter: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(solver="lbfgs", max_iter=max_iter, warm_start=True)


def _fit(model: Any, x: NDArray[np.float32], y: NDArray[np.int64], c: float) -> Any:
    """Return `model`, fitted from its last weights; for labels of a single class, a classifier that predicts it."""
    from sklearn.dummy import DummyClassifier

    if y.min() == y.max():
        return DummyClassifier().fit(x, y)
    with warnings.catch_warnings():
        # The probe stops at max_iter on purpose, so the user need not do anything.
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")
        return model.set_params(C=c).fit(x, y)


def _choose_c(
    x: _Features,
    y: NDArray[np.int64],
    rng: np.random.Generator,
    grid: Sequence[float],
    search_images: int,
    max_iter: int,
) -> tuple[float, float | None, int]:
    """Return the C of `grid` with the best validation accuracy, that accuracy in percent, and the number of images."""
    pool = rng.permutation(len(y))[:search_images]
    fit, validation = _stratified_split(y[pool], VALIDATION_SHARE, rng)
    middle = sorted(grid)[len(grid) // 2]
    if len(validation) == 0:
        return middle, None, 0
    fit, validation = pool[fit], pool[validation]
    mean, scale = _moments(_Features(x[fit]))
    fit_x, validation_x = ((x[part] - mean) / scale for part in (fit, validation))
    model = _logistic_regression(max_iter)
    best, best_share = middle, -1.0
    for c in sorted(grid):
        predicted = _fit(model, fit_x, y[fit], c).predict(validation_x)
        share = float((predicted == y[validation]).mean())
        if share > best_share:
            best, best_share = c, share
    return best, 100 * best_share, len(pool)


def _stratified_split(
    labels: NDArray[np.int64], share: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return indices (kept, held out): `share` of each class is held out, and at least one sample of each is kept."""
    held_out: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    for value in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == value))
        # Random rounding makes the share correct on average for small classes.
        number = min(int(share * len(members) + rng.random()), len(members) - 1)
        held_out.append(members[:number])
    indices = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(len(labels)), indices), indices


def _moments(x: _Features) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and standard deviation (D,) of training features; the scale of a constant feature is 1."""
    if x.size <= _LARGE:
        rows = x[:]
        mean, scale = rows.mean(axis=0, dtype=np.float64), rows.std(axis=0, dtype=np.float64)
    else:
        mean = sum(rows.sum(0, dtype=np.float64) for rows in x.parts()) / len(x)
        scale = np.sqrt(sum(np.square(rows - mean).sum(0) for rows in x.parts()) / len(x))
    constant = scale <= 1e-7 * np.maximum(1.0, np.abs(mean))
    return mean.astype(np.float32), np.where(constant, 1.0, scale).astype(np.float32)


def _result(correct: NDArray[np.bool_], setting: dict[str, float], validation: float | None) -> ProbeResult:
    accuracy = 100 * float(correct.mean())
    return ProbeResult(accuracy, binomial_error(accuracy, len(correct)), setting, validation, correct)
