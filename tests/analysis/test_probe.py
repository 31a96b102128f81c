"""Probes against scikit-learn and a slow NumPy version of DINO's vote."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pecobook.analysis import logistic
from pecobook.analysis import probe as probing
from pecobook.analysis.probe import binomial_error, knn_probe, linear_probe, paired_difference, wilson_interval
from pecobook.errors import DataError


def blobs(number: int, classes: int, dim: int, seed: int, noise: float = 1.0) -> tuple[NDArray[Any], NDArray[Any]]:
    centres = np.random.default_rng(7).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, number)
    return (centres[labels] + noise * rng.normal(size=(number, dim))).astype(np.float32), labels


def knn_slowly(x: Any, y: Any, test: Any, k: int, temperature: float) -> NDArray[Any]:
    out = []
    for query in test:
        cosine = [float(query @ row) / float(np.linalg.norm(query) * np.linalg.norm(row)) for row in x]
        near = sorted(range(len(x)), key=lambda i: -cosine[i])[:k]
        votes: dict[int, float] = {}
        for i in near:
            votes[int(y[i])] = votes.get(int(y[i]), 0.0) + math.exp(cosine[i] / temperature)
        out.append(max(sorted(votes), key=lambda label: votes[label]))
    return np.array(out)


@pytest.mark.parametrize("k", [1, 5, 20, 500])
def test_knn_equals_the_slow_version_and_scikit_learn(k: int) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    x, y = blobs(120, 6, 5, 0, noise=2.0)
    y = y * 10 - 3  # labels need not be 0..C-1
    test, test_y = blobs(70, 6, 5, 1, noise=2.0)
    test_y = test_y * 10 - 3
    result = knn_probe(x, y, torch.from_numpy(test), test_y, k=k, chunk=16)
    used = min(k, len(x))
    slow = knn_slowly(x, y, test, used, 0.07)
    peer = KNeighborsClassifier(
        used, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(x, y)
    np.testing.assert_array_equal(result.correct, slow == test_y)
    np.testing.assert_array_equal(result.correct, peer.predict(test) == test_y)
    assert result.setting == {"k": used, "temperature": 0.07}
    assert result.validation_accuracy is None
    assert result.accuracy == pytest.approx(100 * (slow == test_y).mean())


def test_linear_probe_finds_linear_classes_and_equals_scikit_learn_at_its_setting() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = blobs(400, 5, 12, 0, noise=1.5)
    test, test_y = blobs(300, 5, 12, 1, noise=1.5)
    result = linear_probe(100 * x + 3, y, 100 * test + 3, test_y)
    peer = make_pipeline(StandardScaler(), LogisticRegression(C=result.setting["C"], max_iter=200)).fit(x, y)
    assert (result.correct == (peer.predict(test) == test_y)).mean() > 0.99
    assert result.accuracy > 75
    assert result.standard_error == pytest.approx(binomial_error(result.accuracy, 300))
    assert result.setting["search_images"] == 400
    assert result.validation_accuracy is not None


def test_linear_probe_depends_on_its_seed_only_and_shows_its_subsample() -> None:
    x, y = blobs(300, 4, 6, 0, noise=3.0)
    first, again = (linear_probe(x, y, x, y, seed=1, search_images=100) for _ in range(2))
    assert first.summary() == again.summary()
    assert first.setting["search_images"] == 100


def test_linear_probe_regularises_noise_and_scores_chance_on_it() -> None:
    rng = np.random.default_rng(0)
    x, test = rng.normal(size=(300, 100)), rng.normal(size=(1000, 100))
    y, test_y = rng.integers(0, 4, 300), rng.integers(0, 4, 1000)
    result = linear_probe(x, y, test, test_y)
    assert abs(result.accuracy - 25) < 4 * result.standard_error


@pytest.mark.parametrize(
    "labels", [[0, 1, 2, 3, 4], [0, 0, 0, 1, 2], [3, 3, 3, 3, 3], [0, 0, 0, 0, 9], [0, 0, 1, 1, 2]]
)
def test_small_sets_with_single_samples_do_not_crash(labels: list[int]) -> None:
    x = np.eye(5, 3)
    for seed in range(4):
        result = linear_probe(x, np.array(labels), x, np.array(labels), seed=seed)
        assert 0 <= result.accuracy <= 100
    assert 0 <= knn_probe(x, np.array(labels), x, np.array(labels)).accuracy <= 100


def test_a_test_class_absent_from_training_counts_as_wrong() -> None:
    x, y = blobs(60, 3, 6, 0, noise=0.1)
    for probe in (linear_probe, knn_probe):
        assert probe(x, y, x, np.full(60, 99)).accuracy == 0


def test_constant_features_are_harmless() -> None:
    x, y = blobs(100, 3, 4, 0, noise=0.1)
    x[:, 1] = 1e6
    assert linear_probe(x, y, x, y).accuracy > 90


def test_bad_input_is_named() -> None:
    x, y = blobs(10, 2, 3, 0)
    with pytest.raises(DataError, match="test part"):
        linear_probe(x, y, x, y[:-1])
    x[0, 0] = np.nan
    with pytest.raises(DataError, match="NaN"):
        knn_probe(x, y, x, y)
    with pytest.raises(ValueError, match="k=0"):
        knn_probe(np.ones((2, 2)), np.ones(2), np.ones((2, 2)), np.ones(2), k=0)


@pytest.mark.parametrize(("right", "number"), [(0, 4), (4, 4), (1, 4), (0, 1), (7, 20), (300, 1000)])
def test_wilson_interval_against_the_test_that_it_inverts(right: int, number: int) -> None:
    """An end p of the interval is where the observed share is exactly 1.96 standard errors of p away."""
    low, high = (end / 100 for end in wilson_interval(100 * right / number, number))
    share = right / number
    for end, is_trivial in ((low, right == 0), (high, right == number)):
        if is_trivial:
            assert end == pytest.approx(share)
        else:
            assert abs(share - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / number))


def test_sampling_error_is_never_0_and_the_binomial_error_on_many_images() -> None:
    assert binomial_error(0, 4) == binomial_error(100, 4) == pytest.approx(10)  # the interval is 0 to 20%
    assert binomial_error(30, 10_000) == pytest.approx(100 * math.sqrt(0.3 * 0.7 / 10_000), rel=1e-3)
    result = knn_probe(np.eye(4), np.arange(4), np.eye(4), np.arange(4), k=1)
    assert result.summary()["interval_95"] == [51.01, 100.0]


def test_paired_difference_against_its_closed_form_and_by_drawing_again() -> None:
    rng = np.random.default_rng(0)
    a = rng.random(2000) < 0.6
    b = np.where(rng.random(2000) < 0.9, a, ~a)
    difference, error = paired_difference(a, b)
    assert difference == pytest.approx(100 * (a.mean() - b.mean()))
    # Agresti and Min: the Wald error of the four counts with half an image added to each
    only_a, only_b = (((first & ~second).sum() + 0.5) / 2002 for first, second in ((a, b), (b, a)))
    assert error == pytest.approx(100 * math.sqrt((only_a + only_b - (only_a - only_b) ** 2) / 2002))
    draws = [rng.integers(0, 2000, 2000) for _ in range(500)]
    drawn = np.std([100 * (a[i].mean() - b[i].mean()) for i in draws])
    assert error == pytest.approx(drawn, rel=0.15)


def test_paired_difference_edges() -> None:
    assert paired_difference(np.array([True]), np.array([False])) == pytest.approx((100, 100 * (5 / 3) ** 0.5 / 3))
    assert paired_difference(torch.ones(4).bool(), torch.ones(4).bool()) == pytest.approx((0, 100 / 6))
    with pytest.raises(ValueError, match="equally long"):
        paired_difference(np.ones(3), np.ones(4))


@pytest.mark.parametrize("tile", [1, 7, 64, 119])
@pytest.mark.parametrize("half", [False, True])
def test_knn__in_tiles_equals_the_whole(tile: int, half: bool) -> None:
    x, y = blobs(120, 6, 5, 0, noise=2.0)
    test, test_y = blobs(70, 6, 5, 1, noise=2.0)
    train = torch.from_numpy(x).half() if half else torch.from_numpy(x)
    features = probing._Features(train), probing._Features(test)
    whole, tiled = (probing._neighbours(*features, 20, chunk=16, tile=n) for n in (120, tile))
    assert torch.equal(whole[1], tiled[1])
    torch.testing.assert_close(whole[0], tiled[0], rtol=0, atol=2e-7)  # products of other shapes round otherwise
    results = [knn_probe(train, y, test, test_y, chunk=16, tile=n) for n in (120, tile)]
    np.testing.assert_array_equal(results[0].correct, results[1].correct)
    assert results[0].setting == results[1].setting


@pytest.mark.parametrize("classes", [2, 5])
def test_linear_probe__in_parts_equals_scikit_learn(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = blobs(400, classes, 12, 0, noise=1.5)
    test, test_y = blobs(300, classes, 12, 1, noise=1.5)
    whole = linear_probe(x, y * 10 - 3, test, test_y * 10 - 3)
    monkeypatch.setattr(probing, "_LARGE", 100)
    monkeypatch.setattr(logistic, "_VALUES", 500)  # 38 images at a time
    parts = linear_probe(torch.from_numpy(x), y * 10 - 3, test, test_y * 10 - 3)
    assert parts.setting["C"] == whole.setting["C"]
    assert parts.setting["iterations"] < 200
    assert (parts.correct == whole.correct).mean() >= 0.99
    peer = make_peer(x, y, float(whole.setting["C"]))
    mean, scale = x.mean(0), x.std(0)
    ours = logistic.LogisticRegression(
        lambda rows: ((x[rows] - mean) / scale).astype(np.float32), y, 12, c=float(whole.setting["C"]), max_iter=200
    )
    weights = ours._weights.numpy()
    if classes == 2:  # one vector stands for the difference of two
        weights = weights[1:] - weights[:1]
    np.testing.assert_allclose(weights[:, :-1], peer.coef_, atol=2e-3)


def make_peer(x: Any, y: Any, c: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=c, tol=1e-8, max_iter=1000).fit((x - x.mean(0)) / x.std(0), y)


def test_probes__read_wide_features_in_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part has so many values, not so many images: 65,536 bags of 8,192 codes take 2 GB."""
    x, y = blobs(600, 3, 50, 0)
    whole = linear_probe(x, y, x, y, search_images=20)
    sizes, real = list[int](), probing._Features.__getitem__

    def counted(self: Any, rows: Any) -> Any:
        values = real(self, rows)
        sizes.append(values.size)
        return values

    monkeypatch.setattr(probing._Features, "__getitem__", counted)
    monkeypatch.setattr(probing, "_LARGE", 100)
    monkeypatch.setattr(probing, "_PART", 1000)
    monkeypatch.setattr(logistic, "_VALUES", 1000)
    parts = linear_probe(x, y, x, y, search_images=20)
    assert (parts.correct == whole.correct).mean() >= 0.99
    assert knn_probe(x, y, x, y, chunk=16).accuracy > 90
    assert 950 <= max(sizes) <= 1000
