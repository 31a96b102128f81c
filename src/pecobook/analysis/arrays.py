"""The interfaces of tokenizers and masked models that the analysis needs, array conversion, and evaluation mode.

The analysis uses only the methods of the two protocols, so it also works for tokenizers and models of other libraries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[Any] | Tensor
"""A NumPy array or a tensor. Results for scikit-learn are NumPy arrays, and results for torch are tensors."""


class Tokenizer(Protocol):
    """Encodes images to codes and decodes codes to images, like `pecobook.PerceptualTokenizer`."""

    @property
    def codebook(self) -> Tensor:
        """The codewords, float (K, D)."""

    def encode(self, images: Tensor, /) -> Tensor:
        """Encode images, float (B, 3, H, W) in [0, 1], to codes, int64 (B, h, w)."""

    def decode(self, codes: Tensor, /) -> Tensor:
        """Decode codes, int64 (B, h, w), to images, float (B, 3, H, W) in [0, 1]."""


class MaskedModel(Protocol):
    """Predicts the codes of masked patches, like `pecobook.MaskedImageModel`."""

    def __call__(self, images: Tensor, mask: Tensor, /) -> Tensor:
        """Return logits (number masked, K) for images (B, 3, H, W) and a mask (B, h, w), True = masked.

        The rows of the logits are ordered by image, then by position in row-major order.
        """


def as_numpy(values: Array) -> NDArray[Any]:
    """Convert `values` to a NumPy array on the host."""
    if isinstance(values, Tensor):
        host = values.detach().cpu()
        return (host.float() if host.is_floating_point() else host).numpy()  # NumPy has no bfloat16
    return np.asarray(values)


@contextmanager
def evaluation_mode(*models: object) -> Iterator[None]:
    """Disable gradients, and put every `nn.Module` among `models` into evaluation mode; restore the modes on exit.

    Without evaluation mode, a picture made during a run would update running statistics and apply stochastic depth.
    """
    modules = [module for model in models if isinstance(model, nn.Module) for module in model.modules()]
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
