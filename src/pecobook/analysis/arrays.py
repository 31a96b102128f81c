"""What the analysis takes and how it runs models: the two protocols, array conversion, quiet evaluation.

The analysis asks only for these few methods, so it also serves tokenizers and models that are not ours.
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
"""Numbers from either library; results are NumPy where scikit-learn follows and torch where torch does."""


class Tokenizer(Protocol):
    """Images to codes and back. `pecobook.PerceptualTokenizer` is one."""

    @property
    def codebook(self) -> Tensor:
        """The codewords, float (K, D)."""
        ...

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that it was trained on."""
        ...

    def encode(self, images: Tensor, /) -> Tensor:
        """Float (B, 3, H, W) in [0, 1] to int64 codes (B, h, w)."""
        ...

    def decode(self, codes: Tensor, /) -> Tensor:
        """int64 codes (B, h, w) to float (B, 3, H, W) in [0, 1]."""
        ...


class MaskedModel(Protocol):
    """Predicts the codes of masked patches. `pecobook.MaskedImageModel` is one."""

    def __call__(self, images: Tensor, mask: Tensor, /) -> Tensor:
        """Images (B, 3, H, W) and mask (B, h, w), True = masked, to logits (number masked, K).

        Rows run over the batch, then over positions row by row.
        """
        ...


def as_numpy(values: Array) -> NDArray[Any]:
    """`values` as a NumPy array on the host, whatever it was."""
    if isinstance(values, Tensor):
        host = values.detach().cpu()
        return (host.float() if host.is_floating_point() else host).numpy()  # NumPy has no bfloat16
    return np.asarray(values)


def as_tensor(values: Array) -> Tensor:
    """`values` as a tensor, left where it is."""
    return values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))


@contextmanager
def evaluating(*models: object) -> Iterator[None]:
    """No gradients, and every `nn.Module` among `models` in evaluation mode, put back as it was afterwards.

    Without the second part a picture taken in the middle of a run would update running statistics and drop
    paths at random.
    """
    modules = [part for model in models if isinstance(model, nn.Module) for part in model.modules()]
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
