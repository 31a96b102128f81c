"""The measurements of a tokenizer, which `measure.py` makes and `pictures.py` draws."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pecobook.analysis.codewords import CodeUsage


@dataclasses.dataclass(frozen=True)
class TokenizerMetrics:
    """The measurements of one tokenizer."""

    name: str
    values: dict[str, Any]
    """The metrics, as in `analysis.json`."""
    images: Tensor
    """The images of the picture of reconstructions, float (n, 3, S, S)."""
    restored: Tensor
    """The reconstructions of `images`."""
    usage: CodeUsage
    correct: dict[str, NDArray[np.bool_]]
    """Which held-out images each probe classified correctly, by the name of the probe; empty without labels."""
