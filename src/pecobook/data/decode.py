"""Encoded bytes to a tensor, for every mode an image can have; whatever is wrong with one becomes `BadImage`.

Pillow reads the header (20 microseconds) and names the format, the mode and the size. 8-bit JPEG and WebP are
then decoded by torchvision, in half to three quarters of Pillow's time; everything else, and whatever
torchvision refuses, by Pillow.

PNG is Pillow's on purpose: torchvision 0.29's `decode_png` takes the process down (segmentation fault) on
some corrupt files, which would end a run of many hours, and prints libpng's warnings about colour profiles.
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

# Twice Pillow's own warning limit, which is where Pillow raises, too: 512 MiB of RGB.
MAX_PIXELS = 178_956_970

# Only these are tried: Pillow also knows formats that start other programs (EPS) or that have no signature
# (TGA).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")


class BadImage(Exception):  # noqa: N818 (an incident to count, not an error that ends anything)
    """One image that cannot be read. It is skipped, counted and listed, and never ends a run.

    Attributes:
        name: which image, as `ImageSource.identify` writes it.
        reason: what is wrong with it, a few words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both as arguments, so that it survives pickling between processes
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode(data: bytes, channels: int = 3, *, name: str = "image") -> Tensor:
    """Decode an image file that was read into memory.

    The EXIF orientation is applied. Of an animation, the first frame is taken. What is transparent is laid on
    white. 16-bit values v become v / 257, so that the whole range is kept. Floats within [0, 1] are
    multiplied by 255; other floats, and 32-bit or signed integers, have no agreed range and are stretched
    from their least to their greatest finite value (a constant image becomes 0, not-a-number becomes 0).
    Colour profiles are ignored.

    Args:
        data: the file's bytes.
        channels: 3 for RGB, 1 for luma (ITU-R 601).
        name: how to call the image in an error.

    Returns:
        uint8 (channels, H, W), in memory mostly as H, W, channels, which resizing likes best: not contiguous.

    Raises:
        BadImage: whatever is wrong with the bytes: empty, not an image, truncated, more than `MAX_PIXELS`
        pixels.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels}; it must be 1 or 3")
    if not data:
        raise BadImage(name, "empty file")
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata and of large images; neither matters here
            warnings.simplefilter("ignore")
            return _decode(data, channels)
    except BadImage as error:
        raise BadImage(name, error.reason) from None
    # A decoder fed with arbitrary bytes may raise anything (SyntaxError, struct.error, KeyError, MemoryError,
    # ...).
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
            except RuntimeError:  # Pillow forgives more: a missing end marker, for one
                pass
        return _from_pillow(image, channels)


def _is_fast(image: Image) -> bool:
    """Whether torchvision decodes it, and to the same pixels as Pillow."""
    if image.format in ("JPEG", "MPO"):
        return image.mode in ("RGB", "L")
    if image.format == "WEBP":
        # torchvision knows neither the orientation nor the frames of a WebP.
        return image.mode == "RGB" and "exif" not in image.info and not getattr(image, "is_animated", False)
    return False


def _decode_fast(data: bytes, format_name: str | None, channels: int) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg, decode_webp

    # a copy: torch wants memory that may be written
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if format_name == "WEBP":
        pixels: Tensor = decode_webp(buffer, mode=ImageReadMode.RGB)
        return pixels if channels == 3 else _luma(pixels)
    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    pixels = decode_jpeg(buffer, mode=mode, apply_exif_orientation=True)
    return pixels  # noqa: RET504 (torchvision is untyped; the annotation above says what it is)


def _luma(pixels: Tensor) -> Tensor:
    """RGB uint8 (3, H, W) to luma uint8 (1, H, W), rounded as Pillow does."""
    # 0.299, 0.587, 0.114 of 2^16
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32)[:, None, None]
    return ((pixels.int() * weights).sum(0, keepdim=True) + 0x8000 >> 16).to(torch.uint8)


def _from_pillow(image: Image, channels: int) -> Tensor:
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
    """A single channel of more than 8 bits, (H, W), to 8 bits."""
    values = np.asarray(image).astype(np.float64)
    # Pillow holds the 16 bits of a PGM as 32-bit integers scaled to 16 bits.
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
        return "not an image, or of a format that is not read"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels"
    text = str(error).strip().split("\n")[0]
    return text or type(error).__name__


def _too_large(width: int, height: int) -> str:
    return f"{width} x {height} is more than {MAX_PIXELS:,} pixels"


def header_size(file: Path | bytes) -> tuple[int, int] | None:
    """Height and width of an image as it will be decoded, from its header; None when that cannot be read."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            width, height = image.size
            # Pillow would decode a PNG to look for an orientation behind its pixels.
            known = image.format != "PNG" or "exif" in image.info
            turned = known and image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # a header of arbitrary bytes may raise anything
        return None
    return (width, height) if turned else (height, width)
