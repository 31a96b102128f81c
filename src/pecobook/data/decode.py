"""Decodes image files of every mode to tensors. Any error of decoding becomes a `BadImage`.

Pillow first reads the header (20 microseconds), which gives the format, the mode and the size. torchvision then decodes
8-bit JPEG and WebP, in half to three quarters of Pillow's time. Pillow decodes all other images, and those that
torchvision refuses.

PNG images go to Pillow on purpose: `decode_png` of torchvision 0.29 crashes the process (segmentation fault) on some
corrupt files, which would end a run of many hours, and it prints libpng's warnings about colour profiles.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

# Pillow also raises at this number, which is twice its limit for a warning: 512 MiB of RGB.
MAX_PIXELS = 178_956_970

# Pillow tries only these formats. It also supports formats that start other programs (EPS) or that have no signature
# (TGA).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")


class BadImage(Exception):  # noqa: N818 (it is counted, and ends no run)
    """Raised for an image that cannot be read. A run skips the image, counts it and lists it.

    Attributes:
        name: the image's name, as `ImageSource.identify` returns it.
        reason: what is wrong with the image, in a few words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # pickling between processes needs both as arguments
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode(data: bytes, channels: int = 3, *, name: str = "image") -> Tensor:
    """Decode the bytes of an image file.

    The EXIF orientation is applied. An animation gives its first frame. Transparent images are composited on white.
    16-bit values v become v / 257, so that the whole range is kept. Floats within [0, 1] are multiplied by 255. Other
    floats, and 32-bit or signed integers, have no agreed range: they are stretched from their minimum to their maximum
    finite value (a constant image becomes 0, NaN becomes 0). Colour profiles are ignored.

    Args:
        data: the file's bytes.
        channels: 3 for RGB, 1 for luma (ITU-R 601).
        name: the image's name in an error.

    Returns:
        uint8 (channels, H, W). The memory layout is mostly H, W, channels, which is the fastest one to resize, so the
        tensor is not contiguous.

    Raises:
        BadImage: the bytes are empty, not an image, truncated or otherwise damaged, or the image has more than
            `MAX_PIXELS` pixels.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; it must be 1 or 3")
    if not data:
        raise BadImage(name, "empty file")
    try:
        with warnings.catch_warnings():
            # Pillow warns about odd metadata and large images; neither matters here.
            warnings.simplefilter("ignore")
            return _decode(data, channels)
    except BadImage as error:
        raise BadImage(name, error.reason) from None
    # On arbitrary bytes a decoder may raise any exception (SyntaxError, struct.error, KeyError, MemoryError, ...).
    except Exception as error:
        raise BadImage(name, _reason(error)) from error


def _decode(data: bytes, channels: int) -> Tensor:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BadImage("", _too_large(width, height))
        if _is_fast(image):
            try:
                return _decode_fast(data, image.format, channels)
            except RuntimeError:  # Pillow tolerates more damage, such as a missing end marker
                pass
        return from_pillow(image, channels)


def _is_fast(image: Image) -> bool:
    """Return whether torchvision can decode the image to the same pixels as Pillow."""
    if image.format in ("JPEG", "MPO"):
        return image.mode in ("RGB", "L")
    if image.format == "WEBP":
        # torchvision ignores the orientation and the frames of a WebP.
        return image.mode == "RGB" and "exif" not in image.info and not getattr(image, "is_animated", False)
    return False


def _decode_fast(data: bytes, format_name: str | None, channels: int) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg, decode_webp

    # a copy, because torch needs writable memory
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if format_name == "WEBP":
        pixels: Tensor = decode_webp(buffer, mode=ImageReadMode.RGB)
        return pixels if channels == 3 else _luma(pixels)
    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    pixels = decode_jpeg(buffer, mode=mode, apply_exif_orientation=True)
    return pixels  # noqa: RET504 (torchvision is untyped; the annotation above gives the type)


def _luma(pixels: Tensor) -> Tensor:
    """Convert RGB uint8 (3, H, W) to luma uint8 (1, H, W), rounded as Pillow does."""
    # 0.299, 0.587 and 0.114 times 2^16
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32)[:, None, None]
    return ((pixels.int() * weights).sum(0, keepdim=True) + 0x8000 >> 16).to(torch.uint8)


def from_pillow(image: Image, channels: int) -> Tensor:
    """Decode an opened image with Pillow, upright: uint8 (channels, H, W)."""
    import PIL.Image
    from PIL import ImageOps

    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):
        image = PIL.Image.fromarray(_to_8_bits(image))
    if image.has_transparency_data:
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    pixels = np.array(image.convert("RGB" if channels == 3 else "L"))  # (H, W, 3) or (H, W)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)


def _to_8_bits(image: Image) -> npt.NDArray[np.uint8]:
    """Convert an image with one channel of more than 8 bits to 8 bits, (H, W)."""
    values = np.asarray(image).astype(np.float64)
    # Pillow stores a 16-bit PGM as 32-bit integers scaled to 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        return np.rint(values / 257).astype(np.uint8)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / max(high - low, np.finfo(float).tiny)
    return np.rint(scaled * 255).astype(np.uint8)


def _reason(error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "not an image, or an unsupported format"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels"
    text = str(error).strip().split("\n")[0]
    return text or type(error).__name__


def _too_large(width: int, height: int) -> str:
    return f"{width} x {height} is more than {MAX_PIXELS:,} pixels"


def header_size(file: Path | bytes) -> tuple[int, int] | None:
    """Read the height and width of an image from its header, as `decode` orients it; None if the header is unreadable.

    Args:
        file: the image's path, or its bytes.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            width, height = image.size
            # Pillow would decode all pixels of a PNG to search for an orientation after them.
            has_exif = image.format != "PNG" or "exif" in image.info
            is_transposed = has_exif and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # a header of arbitrary bytes may raise any exception
        return None
    return (width, height) if is_transposed else (height, width)
