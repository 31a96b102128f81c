"""Multinomial logistic regression on more features than fit into memory in fp32, a few images at a time.

The objective, the solver and its settings are scikit-learn's: L-BFGS on the mean cross-entropy plus half the squared
norm of the weights, divided by C N. Memory beyond the features is that of one part: its features and its logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pecobook.utils.devices import device

Rows = Callable[[slice], NDArray[np.float32]]
"""Returns the standardised features (n, D) of some images."""
_VALUES = 2**24
"""Number of logits, or features, in a part: 64 MB."""


class LogisticRegression:
    """A linear classifier of features.

    Args:
        rows: the training features.
        labels: their labels, int64 (N,), of at least two classes.
        dim: D.
        c: inverse regularisation C.
        max_iter: maximum number of L-BFGS iterations.
    """

    def __init__(self, rows: Rows, labels: NDArray[np.int64], dim: int, *, c: float, max_iter: int) -> None:
        from scipy.optimize import minimize

        self.classes, targets = np.unique(labels, return_inverse=True)
        self._shape, self._place = (len(self.classes), dim + 1), device()
        # For two classes scikit-learn fits one weight vector, whose norm is that of two of opposite sign times 2.
        penalty = (2 if len(self.classes) == 2 else 1) / (c * len(labels))
        solved: Any = minimize(
            lambda flat: self._objective(flat, rows, torch.from_numpy(targets), penalty),
            np.zeros(self._shape[0] * self._shape[1]),
            method="L-BFGS-B",
            jac=True,
            options={"maxiter": max_iter, "maxls": 50, "gtol": 1e-4, "ftol": 64 * np.finfo(float).eps},
        )
        self.n_iter_ = int(solved.nit)
        self._weights = self._unpacked(solved.x)

    def _unpacked(self, flat: NDArray[np.float64]) -> Tensor:
        """Return the weights and biases, float (C, D + 1), on the device."""
        return torch.from_numpy(flat.reshape(self._shape)).float().to(self._place)

    def _parts(self, count: int) -> list[slice]:
        size = max(_VALUES // max(self._shape), 1)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _logits(self, weights: Tensor, x: Tensor) -> Tensor:
        return torch.addmm(weights[:, -1], x, weights[:, :-1].T)

    def _objective(
        self, flat: NDArray[np.float64], rows: Rows, targets: Tensor, penalty: float
    ) -> tuple[float, NDArray[np.float64]]:
        """Return the objective and its gradient."""
        weights, count, loss = self._unpacked(flat), len(targets), 0.0
        gradient = np.zeros(self._shape)
        for part in self._parts(count):
            x, y = torch.from_numpy(rows(part)).to(self._place), targets[part].to(self._place)
            logits = self._logits(weights, x)
            loss += float(torch.nn.functional.cross_entropy(logits, y, reduction="sum"))
            error = logits.softmax(1)  # minus the targets: the gradient of the logits
            error[torch.arange(len(y), device=y.device), y] -= 1
            gradient[:, :-1] += (error.T @ x).double().cpu().numpy()
            gradient[:, -1] += error.sum(0).double().cpu().numpy()
        matrix = flat.reshape(self._shape)[:, :-1]
        gradient /= count
        gradient[:, :-1] += penalty * matrix
        return loss / count + penalty * float(np.square(matrix).sum()) / 2, gradient.ravel()

    def predict(self, rows: Rows, count: int) -> NDArray[np.int64]:
        """Return the classes of `count` images, int64 (count,)."""
        best = [
            self._logits(self._weights, torch.from_numpy(rows(part)).to(self._place)).argmax(1).cpu()
            for part in self._parts(count)
        ]
        predicted: NDArray[np.int64] = self.classes[torch.cat(best).numpy()]
        return predicted
