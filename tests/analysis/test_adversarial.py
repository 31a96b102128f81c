"""Attacks, against NumPy on a linear classifier with the gradient written out, and the properties of all attacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pecobook.analysis.adversarial import MOMENTUM, attack

Array = npt.NDArray[np.float64]
SHAPE = (3, 4, 5)


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def numpy_attack(
    weights: Array, images: Array, labels: npt.NDArray[np.int64], eps: float, step: float, steps: int, momentum: float
) -> Array:
    """Attack the classifier `images @ weights.T`: its gradient of the cross-entropy is (p - y) @ weights."""
    attacked, total = images.copy(), np.zeros_like(images)
    for _ in range(steps):
        gradient = (softmax(attacked @ weights.T) - np.eye(len(weights))[labels]) @ weights
        total = momentum * total + gradient / np.abs(gradient).sum(1, keepdims=True)
        attacked = attacked + step * np.sign(total)
        attacked = np.clip(np.clip(attacked, images - eps, images + eps), 0, 1)
    return attacked


@pytest.mark.parametrize("name", MOMENTUM)
def test_attack__is_numpys_on_a_linear_classifier(name: str) -> None:
    rng = np.random.default_rng(0)
    weights, images, labels = rng.normal(size=(4, 60)), rng.uniform(size=(6, 60)), rng.integers(0, 4, 6)
    matrix = torch.from_numpy(weights)

    def classifier(x: Tensor) -> Tensor:
        return x.flatten(1) @ matrix.T

    batch = torch.from_numpy(images).view(6, *SHAPE)
    options: dict[str, Any] = {"eps": 0.1, "step": 0.023, "steps": 9, "momentum": MOMENTUM[name]}
    attacked = attack(classifier, batch, torch.from_numpy(labels), **options)
    expected = numpy_attack(weights, images, labels, **options)
    np.testing.assert_allclose(attacked.flatten(1).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_attack__of_two_classes_reaches_the_corner_that_algebra_gives(momentum: float) -> None:
    """Of two linear classes, the worst image within eps moves every value by eps against the true class."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 60, generator=generator)
    images = 0.2 + 0.6 * torch.rand(5, *SHAPE, generator=generator)
    labels = torch.tensor([0, 1, 0, 1, 1])
    attacked = attack(
        lambda x: x.flatten(1) @ weights.T, images, labels, eps=0.1, step=0.01, steps=20, momentum=momentum
    )
    away = (weights[1 - labels] - weights[labels]).sign().view(-1, *SHAPE)
    torch.testing.assert_close(attacked, images + 0.1 * away)


@given(seed=st.integers(0, 50), eps=st.floats(0, 1), steps=st.integers(1, 6), momentum=st.sampled_from([0.0, 1.0]))
def test_attack__stays_within_eps_and_the_range_and_lowers_no_loss(
    seed: int, eps: float, steps: int, momentum: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(3, *SHAPE, generator=generator)
    images[0] = images[0].round()  # black and white: half of the steps leave the range
    labels = torch.randint(3, (3,), generator=generator)
    weights = torch.randn(3, 60, generator=generator)

    def classifier(x: Tensor) -> Tensor:
        return x.flatten(1) @ weights.T

    attacked = attack(classifier, images, labels, eps=eps, step=eps / steps, steps=steps, momentum=momentum)
    assert float((attacked - images).abs().max()) <= eps + 1e-6
    assert float(attacked.min()) >= 0
    assert float(attacked.max()) <= 1
    before, after = (F.cross_entropy(classifier(x), labels, reduction="none") for x in (images, attacked))
    assert bool((after >= before - 1e-4).all())  # the loss of a linear classifier is convex


def test_attack__of_an_image_does_not_depend_on_the_others_and_leaves_the_network_alone() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6, 4)).eval()
    images, labels = torch.rand(6, *SHAPE), torch.arange(6) % 4
    options: dict[str, Any] = {"eps": 0.05, "step": 0.01, "steps": 10, "momentum": 1.0}
    together = attack(network, images, labels, **options)
    alone = torch.cat([attack(network, images[i : i + 1], labels[i : i + 1], **options) for i in range(6)])
    torch.testing.assert_close(together, alone)
    assert all(value.grad is None for value in network.parameters())
    with torch.no_grad():
        assert F.cross_entropy(network(together), labels) > F.cross_entropy(network(images), labels)


def test_attack__without_a_gradient_changes_nothing() -> None:
    images = torch.rand(2, *SHAPE)
    attacked = attack(lambda x: 0 * x.flatten(1)[:, :3], images, torch.tensor([0, 1]), eps=0.1, step=0.1, steps=3)
    assert torch.equal(attacked, images)
