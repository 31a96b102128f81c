"""How many codes stay when an image changes in ways that leave its meaning: a small shift, blur, jitter, JPEG, a flip.

Shapes: images float (N, 3, H, W) in [0, 1], codes int64 (N, h, w).
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pecobook.analysis.arrays import Tokenizer
from pecobook.analysis.reconstruction import encode_all

Change = Callable[[Tensor], Tensor]
"""Images (N, 3, H, W) in [0, 1] to changed ones."""


def shift(images: Tensor, pixels: int) -> Tensor:
    """Moved to the right and down by `pixels`; the border repeats."""
    padded = torch.nn.functional.pad(images, (pixels, 0, pixels, 0), "replicate")
    return padded[..., : images.shape[-2], : images.shape[-1]]


def blur(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of `sigma` pixels."""
    from torchvision.transforms.functional import gaussian_blur

    side = 2 * int(np.ceil(3 * sigma)) + 1
    side = min(side, 2 * min(images.shape[-2:]) - 1)
    return gaussian_blur(images, [side, side], [sigma, sigma])  # type: ignore[no-any-return]


def jitter(images: Tensor, strength: float = 0.2) -> Tensor:
    """Brightness and contrast raised and saturation lowered by `strength`."""
    from torchvision.transforms import functional as T

    images = T.adjust_contrast(T.adjust_brightness(images, 1 + strength), 1 + strength)
    return T.adjust_saturation(images, 1 - strength)  # type: ignore[no-any-return]


def jpeg(images: Tensor, quality: int = 50) -> Tensor:
    """Through JPEG and back."""
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image

    out = []
    for image in images:
        buffer = io.BytesIO()
        to_pil_image(image.clamp(0, 1).cpu()).save(buffer, "JPEG", quality=quality)
        out.append(pil_to_tensor(Image.open(buffer)).float() / 255)
    return torch.stack(out).to(images)


def changes(stride: int) -> dict[str, Change]:
    """The changes by name, for a tokenizer of this stride; a flip is undone in the codes."""
    return {
        "none": lambda images: images,
        "shift by 1 pixel": lambda images: shift(images, 1),
        "shift by a quarter patch": lambda images: shift(images, max(stride // 4, 1)),
        "blur, sigma 1": lambda images: blur(images, 1.0),
        "colour jitter 0.2": jitter,
        "JPEG, quality 50": jpeg,
        "flip": lambda images: images.flip(3),
    }


def stability(tokenizer: Tokenizer, images: Tensor, codes: Tensor, stride: int) -> dict[str, float]:
    """Percent of `codes` that the changed images have at the same place, by change."""
    found = {}
    for name, change in changes(stride).items():
        other = encode_all(tokenizer, change(images))
        if name == "flip":
            other = other.flip(2)
        found[name] = 100 * float((other == codes).float().mean())
    return found
