"""Share of codes that stay unchanged under changes that keep the meaning of an image, such as a small shift or a flip.

Shapes: images float (N, 3, H, W) in [0, 1], codes int64 (N, h, w).
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as T

from pecobook.analysis.arrays import Tokenizer
from pecobook.analysis.reconstruction import encode_all

Change = Callable[[Tensor], Tensor]
"""Maps images (N, 3, H, W) in [0, 1] to changed images."""


def shift(images: Tensor, pixels: int) -> Tensor:
    """Shift images to the right and down by `pixels`; the border is replicated."""
    padded = torch.nn.functional.pad(images, (pixels, 0, pixels, 0), "replicate")
    return padded[..., : images.shape[-2], : images.shape[-1]]


def blur(images: Tensor, sigma: float) -> Tensor:
    """Blur images with a Gaussian of standard deviation `sigma` pixels."""
    side = 2 * int(np.ceil(3 * sigma)) + 1
    side = min(side, 2 * min(images.shape[-2:]) - 1)
    return T.gaussian_blur(images, [side, side], [sigma, sigma])  # type: ignore[no-any-return]


def jitter(images: Tensor, strength: float = 0.2) -> Tensor:
    """Increase brightness and contrast, and reduce saturation, by `strength`."""
    images = T.adjust_contrast(T.adjust_brightness(images, 1 + strength), 1 + strength)
    return T.adjust_saturation(images, 1 - strength)  # type: ignore[no-any-return]


def jpeg(images: Tensor, quality: int = 50) -> Tensor:
    """Compress images as JPEG and decode them again."""
    decoded = []
    for image in images:
        buffer = io.BytesIO()
        T.to_pil_image(image.clamp(0, 1).cpu()).save(buffer, "JPEG", quality=quality)
        decoded.append(T.pil_to_tensor(Image.open(buffer)).float() / 255)
    return torch.stack(decoded).to(images)


def changes(stride: int) -> dict[str, Change]:
    """Return the changes by name, for a tokenizer with this stride; `stability` reverses the flip in the codes."""
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
    """Return the percentage of `codes` that stay the same at their position when the images change, by change."""
    percentages = {}
    for name, change in changes(stride).items():
        changed_codes = encode_all(tokenizer, change(images))
        if name == "flip":
            changed_codes = changed_codes.flip(2)
        percentages[name] = 100 * float((changed_codes == codes).float().mean())
    return percentages
