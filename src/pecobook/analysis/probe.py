"""Linear probe and k-NN: how much frozen features say about the class.

Shapes: N images, D features, C classes. Features are float (N, D), labels int (N,), from NumPy or torch.
Both probes keep which test images were right, so that two of them, scored on the same images, can be
compared in pairs: `paired_difference` has a far smaller error than two separate intervals.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pecobook.analysis.arrays import Array, as_numpy
from pecobook.errors import DataError

C_GRID = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Inverse regularisation strengths tried by the linear probe, strongest regularisation first."""


@dataclass(frozen=True)
class ProbeResult:
    """The score of one probe on the test images."""

    accuracy: float
    """Percent of the test images classified correctly."""
    standard_error: float
    """Binomial sampling error of `accuracy`, percent points. It counts the test images only, not seeds."""
    setting: dict[str, float]
    """What was chosen or fixed, for example `{"C": 0.01, "search_images": 10000}` or `{"k": 20}`."""
    validation_accuracy: float | None
    """Percent right on the validation part that chose the setting; None where nothing was chosen."""
    correct: NDArray[np.bool_] = field(repr=False)
    """(number of test images,) True where the probe was right, in the order of the test images."""

    def summary(self) -> dict[str, Any]:
        """The figures as JSON takes them, without the per-image part."""
        validation = None if self.validation_accuracy is None else round(self.validation_accuracy, 3)
        return {
            "accuracy": round(self.accuracy, 3),
            "standard_error": round(self.standard_error, 3),
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
    grid: Sequence[float] = C_GRID,
    search_images: int = 10_000,
    max_iter: int = 200,
) -> ProbeResult:
    """Multinomial logistic regression on standardised features.

    The inverse regularisation C is the one of `grid` that does best on a stratified 15% of the training
    images (ties go to the stronger regularisation); the probe is then fitted again on all training images.
    The test images choose nothing. At most `search_images` training images, drawn by `seed`, take part in
    that choice: all five fits on 38,000 x 192 features and 100 classes would cost minutes on two cores. The
    number used is reported in `setting`, and so are the iterations of the last fit. Test images of a class
    that training lacks count as wrong.
    """
    data = _Probe.of(train_x, train_y, test_x, test_y)
    rng = np.random.default_rng(seed)
    c, validation, searched = _choose_c(data, rng, grid, search_images, max_iter)
    mean, scale = _moments(data.train_x)
    model = _Logistic(max_iter).fit((data.train_x - mean) / scale, data.train_y, c)
    predicted = model.predict((data.test_x - mean) / scale)
    setting = {"C": c, "search_images": searched, "iterations": model.iterations, "max_iter": max_iter}
    return _result(predicted == data.test_y, setting, validation)


def validation_accuracy(x: Array, y: Array, *, seed: int = 0, search_images: int = 4000) -> float:
    """Percent right on a stratified 15% of at most `search_images` training images: a quick look, to choose features.

    Three strengths of regularisation are tried and the best one counts. NaN where no class can spare an image.
    """
    data = _Probe.of(x, y, x, y)
    _, found, _ = _choose_c(data, np.random.default_rng(seed), (1e-3, 1e-2, 1e-1), search_images, 100)
    return float("nan") if found is None else found


def knn_probe(
    train_x: Array,
    train_y: Array,
    test_x: Array,
    test_y: Array,
    *,
    k: int = 20,
    temperature: float = 0.07,
    chunk: int = 512,
) -> ProbeResult:
    """Weighted k-nearest-neighbour vote on cosine similarity, DINO's rule (arXiv 2104.14294).

    A neighbour at similarity s votes for its class with weight exp(s / temperature). k shrinks to the number
    of training images. Test images are handled `chunk` at a time, so chunk x N similarities are the peak
    memory.
    """
    if k < 1 or temperature <= 0:
        raise ValueError(f"knn_probe needs k >= 1 and temperature > 0, got k={k}, temperature={temperature}")
    data = _Probe.of(train_x, train_y, test_x, test_y)
    k = min(k, len(data.train_y))
    classes, position = np.unique(data.train_y, return_inverse=True)
    labels = torch.from_numpy(position.reshape(-1).astype(np.int64))
    bank = torch.nn.functional.normalize(torch.from_numpy(data.train_x), dim=1)
    queries = torch.nn.functional.normalize(torch.from_numpy(data.test_x), dim=1)
    predicted = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), chunk):
        near, index = (queries[start : start + chunk] @ bank.T).topk(k, dim=1)  # (b, k) each
        # Subtracting 1, the greatest cosine, changes no vote's rank and keeps small temperatures finite.
        weight = torch.exp((near.double() - 1) / temperature)
        votes = torch.zeros(len(near), len(classes), dtype=torch.float64).scatter_add_(1, labels[index], weight)
        predicted[start : start + chunk] = votes.argmax(dim=1).numpy()
    return _result(classes[predicted] == data.test_y, {"k": k, "temperature": temperature}, None)


def paired_difference(correct_a: Array, correct_b: Array) -> tuple[float, float]:
    """Accuracy of a minus accuracy of b and its standard error, both in percent points.

    Both arrays are bool (number of test images,) over the same images in the same order
    (`ProbeResult.correct`). The error is that of the mean of per-image differences, as in McNemar's test, so
    images on which both agree add nothing to it.
    """
    a, b = as_numpy(correct_a).astype(np.float64), as_numpy(correct_b).astype(np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"paired_difference needs two equally long, non-empty rows, got {a.shape} and {b.shape}")
    gain = a - b
    spread = math.sqrt(float(np.square(gain - gain.mean()).sum()) / max(len(gain) - 1, 1))
    return 100 * float(gain.mean()), 100 * spread / math.sqrt(len(gain))


def binomial_error(accuracy: float, number: int) -> float:
    """Sampling error in percent points of an `accuracy` in percent, measured on `number` images."""
    share = min(max(accuracy / 100, 0.0), 1.0)
    return 100 * math.sqrt(share * (1 - share) / number)


@dataclass(frozen=True)
class _Probe:
    """Checked inputs: features float32 (N, D), labels int64 (N,)."""

    train_x: NDArray[np.float32]
    train_y: NDArray[np.int64]
    test_x: NDArray[np.float32]
    test_y: NDArray[np.int64]

    @classmethod
    def of(cls, train_x: Array, train_y: Array, test_x: Array, test_y: Array) -> _Probe:
        return cls(*_checked("training", train_x, train_y), *_checked("test", test_x, test_y))


def _checked(part: str, x: Array, y: Array) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    features, labels = as_numpy(x).astype(np.float32), as_numpy(y).astype(np.int64)
    if features.ndim != 2 or labels.shape != features.shape[:1] or len(labels) == 0:
        raise DataError(
            f"A probe needs features (N, D) and labels (N,) with N > 0; the {part} part has features "
            f"{features.shape} and labels {labels.shape}."
        )
    if not np.isfinite(features).all():
        raise DataError(f"The {part} features of a probe hold NaN or infinity: the network diverged.")
    return features, labels


class _Logistic:
    """scikit-learn's logistic regression, warm-started between fits; constant when there is one class."""

    def __init__(self, max_iter: int) -> None:
        self.max_iter = max_iter
        self.model: Any = None
        self.only: int | None = None

    def fit(self, x: NDArray[np.float32], y: NDArray[np.int64], c: float) -> _Logistic:
        from sklearn.linear_model import LogisticRegression

        if y.min() == y.max():
            self.only = int(y[0])
            return self
        if self.model is None:
            self.model = LogisticRegression(solver="lbfgs", max_iter=self.max_iter, warm_start=True)
        self.model.set_params(C=c)
        with warnings.catch_warnings():
            # Stopping at max_iter is a setting of the probe, not something a user has to act on.
            warnings.filterwarnings("ignore", message="lbfgs failed to converge")
            self.model.fit(x, y)
        return self

    def predict(self, x: NDArray[np.float32]) -> NDArray[np.int64]:
        if self.only is not None:
            return np.full(len(x), self.only, dtype=np.int64)
        return np.asarray(self.model.predict(x), dtype=np.int64)

    @property
    def iterations(self) -> int:
        """Steps of L-BFGS in the last fit; equal to `max_iter` where it stopped before it converged."""
        return 0 if self.model is None else int(self.model.n_iter_.max())


def _choose_c(
    data: _Probe, rng: np.random.Generator, grid: Sequence[float], search_images: int, max_iter: int
) -> tuple[float, float | None, int]:
    """The C of `grid` best on validation, its accuracy in percent, and how many images took part."""
    pool = rng.permutation(len(data.train_y))[:search_images]
    fit, held = _stratified_split(data.train_y[pool], 0.15, rng)
    middle = sorted(grid)[len(grid) // 2]
    if len(held) == 0 or len(grid) == 1:
        return middle, None, 0
    fit, held = pool[fit], pool[held]
    mean, scale = _moments(data.train_x[fit])
    x, held_x = (data.train_x[fit] - mean) / scale, (data.train_x[held] - mean) / scale
    model = _Logistic(max_iter)
    best, best_right = middle, -1.0
    for c in sorted(grid):
        right = float((model.fit(x, data.train_y[fit], c).predict(held_x) == data.train_y[held]).mean())
        if right > best_right:
            best, best_right = c, right
    return best, 100 * best_right, len(pool)


def _stratified_split(
    labels: NDArray[np.int64], share: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices (kept, held out): `share` of every class held out, never a whole class, so one sample stays."""
    held: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
    for value in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == value))
        # Rounding at random keeps the share right on average where classes are small.
        number = min(int(share * len(members) + rng.random()), len(members) - 1)
        held.append(members[:number])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), out), out


def _moments(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation (D,) of training features; a constant feature gets scale 1 and stays 0."""
    mean, scale = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    constant = scale <= 1e-7 * np.maximum(1.0, np.abs(mean))
    return mean.astype(np.float32), np.where(constant, 1.0, scale).astype(np.float32)


def _result(correct: NDArray[np.bool_], setting: dict[str, float], validation: float | None) -> ProbeResult:
    accuracy = 100 * float(correct.mean())
    return ProbeResult(accuracy, binomial_error(accuracy, len(correct)), setting, validation, correct)
