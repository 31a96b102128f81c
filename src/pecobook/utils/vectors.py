"""Vectors scaled to unit length."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

_MIN_LENGTH = 1e-3


def unit_length(vectors: Tensor) -> Tensor:
    """Scale vectors (N, D, ...) along the second dimension to unit length.

    Vectors shorter than 0.001 stay shorter than 1. The gradient of the scaling is 1 / length, so a zero vector, which a
    flat image can give, would otherwise have a gradient of 1e12.
    """
    return F.normalize(vectors, dim=1, eps=_MIN_LENGTH)
