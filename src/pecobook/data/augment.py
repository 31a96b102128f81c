"""timm's augmentations of classification, as pure functions of a key.

They draw from Python's and NumPy's global generators, which are seeded before and put back after.
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
    """Python's and NumPy's global generators begin at `seed` (64 bits) and are as they were afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@lru_cache(maxsize=4)
def _rand_augment(policy: str) -> Any:
    from timm.data.auto_augment import rand_augment_transform

    try:
        # What a rotation or shear uncovers is ImageNet's mean colour.
        return rand_augment_transform(policy, {"translate_const": 100, "img_mean": (124, 116, 104)})
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(
            f"--rand-augment '{policy}' is not in timm's words, such as rand-m9-mstd0.5-inc1: {error}"
        ) from None


def check_policy(policy: str) -> None:
    """Raise ConfigError for a policy of RandAugment that timm does not understand."""
    if policy and not policy.startswith("rand"):
        raise ConfigError(f"--rand-augment '{policy}' is not in timm's words, such as rand-m9-mstd0.5-inc1.")
    if policy:
        _rand_augment(policy)


def rand_augment(image: Tensor, policy: str, view_key: int) -> Tensor:
    """RandAugment (arXiv 1909.13719) by timm's policy: uint8 (3, H, W) to the same."""
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image

    with seeded(view_key):
        return pil_to_tensor(_rand_augment(policy)(to_pil_image(image)))  # type: ignore[no-any-return]


def random_erasing(images: Tensor, probability: float) -> Tensor:
    """Fill a rectangle of some normalised images (B, C, H, W) with noise, in place; draws by torch's global generator.

    Zhong et al., arXiv 1708.04896, with timm's noise for every pixel.
    """
    from timm.data.random_erasing import RandomErasing

    with seeded(int(torch.randint(2**62, ()))):
        return RandomErasing(probability, mode="pixel", device=images.device)(images)  # type: ignore[no-any-return]
