"""Pictures, encoders and comparisons for tests of the decoder."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
import torch
from PIL import Image
from torch import Tensor

Pixels = npt.NDArray[np.uint8]


def picture(height: int = 24, width: int = 40, channels: int = 3) -> Pixels:
    """Make a picture that is smooth, as JPEG needs, and without symmetry, so that a wrong orientation is detected."""
    y, x = np.mgrid[:height, :width]
    planes = [
        60 + 150 * x / width + 30 * np.sin(y / 5),
        40 + 180 * y / height,
        200 - 120 * x * y / (width * height),
        40 + 200 * (x + y) / (width + height),
    ]
    return np.stack(planes[:channels], axis=-1).clip(0, 255).astype(np.uint8)


def encode(image: Image.Image, format_name: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def to_pixels(tensor: Tensor) -> Pixels:
    assert tensor.dtype == torch.uint8
    return np.asarray(tensor.permute(1, 2, 0).numpy())


def assert_close(decoded: Tensor, expected: Image.Image | npt.NDArray[Any], levels: int = 0) -> None:
    expected_pixels = np.asarray(expected).astype(int)
    pixels = to_pixels(decoded).astype(int)
    assert pixels.shape == expected_pixels.shape
    assert np.abs(pixels - expected_pixels).max() <= levels


def tiff(values: npt.NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    options = {"photometric": "rgb" if values.ndim == 3 else "minisblack", **options}
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def png_16(samples: npt.NDArray[np.uint16], colour_type: int) -> bytes:
    """Encode a 16-bit PNG by hand, because Pillow writes 16 bits only for grey images."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    )


def scaled(values: npt.NDArray[Any], low: float, high: float) -> npt.NDArray[Any]:
    return np.rint(np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255)
