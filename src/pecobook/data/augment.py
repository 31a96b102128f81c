"""timm's augmentations for classification, as pure functions of a key.

timm draws from the global generators of Python and NumPy. Each function here seeds both generators before the call and
restores their states afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pecobook.errors import ConfigError


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python and NumPy with `seed` (64 bits), and restore their states on exit."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@lru_cache(maxsize=4)
def _rand_augment(policy: str) -> Any:
    from timm.data.auto_augment import rand_augment_transform

    try:
        # Rotations and shears fill the uncovered area with ImageNet's mean colour.
        return rand_augment_transform(policy, {"translate_const": 100, "img_mean": (124, 116, 104)})
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"--rand-augment '{policy}' is not a valid timm policy, such as rand-m9-mstd0.5-inc1: {error}"
        ) from None


def check_policy(policy: str) -> None:
    """Raise ConfigError if timm cannot parse the RandAugment policy; an empty policy is valid."""
    if policy and not policy.startswith("rand"):
        raise ConfigError(f"--rand-augment '{policy}' is not a valid timm policy, such as rand-m9-mstd0.5-inc1.")
    if policy:
        _rand_augment(policy)


def rand_augment(image: Tensor, policy: str, view_key: int) -> Tensor:
    """Apply RandAugment (arXiv 1909.13719) with a timm policy: uint8 (3, H, W) to uint8 (3, H, W)."""
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image

    with seeded(view_key):
        return pil_to_tensor(_rand_augment(policy)(to_pil_image(image)))  # type: ignore[no-any-return]


def random_erasing(images: Tensor, probability: float) -> Tensor:
    """Fill one rectangle with noise in some of the normalised images (B, C, H, W), in place.

    Random erasing is by Zhong et al., arXiv 1708.04896; as in timm's pixel mode, each pixel gets a noise value of its
    own. torch's global generator gives the seed.
    """
    from timm.data.random_erasing import RandomErasing

    with seeded(int(torch.randint(2**62, ()))):
        return RandomErasing(probability, mode="pixel", device=images.device)(images)  # type: ignore[no-any-return]
