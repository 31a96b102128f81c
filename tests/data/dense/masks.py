"""Masks of every depth as bytes, and masks of a data set that are written anew."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from pecobook.data.dense.mask_files import read_pixels
from pecobook.data.dense.segmentation import SegmentationSource
from pecobook.data.dense.segmentation_check import VerificationResult


def png(samples: Any, depth: int, colour_type: int = 0) -> bytes:
    """Write a PNG sample by sample: (H, W) for grey (0), (H, W, channels) for colour (2), alpha (4, 6)."""
    samples = np.asarray(samples)
    rows = b""
    for row in samples.reshape(len(samples), -1):
        bits = "".join(format(int(sample), f"0{depth}b") for sample in row)
        bits += "0" * (-len(bits) % 8)
        rows += b"\0" + bytes(int(bits[start : start + 8], 2) for start in range(0, len(bits), 8))
    header = struct.pack(">IIBBBBB", samples.shape[1], len(samples), depth, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def tiff(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "TIFF", **options)
    return buffer.getvalue()


def train_of(result: VerificationResult) -> SegmentationSource:
    return cast("SegmentationSource", result.splits.train)


def rewrite(root: Path, change: Any, pattern: str = "masks/*.png") -> None:
    """Replace each mask by the bytes that `change` returns for its values."""
    for file in root.rglob(pattern):
        with Image.open(file) as picture:
            values = np.asarray(picture)
        file.write_bytes(change(values))


def decode_mask(data: bytes, colours: npt.NDArray[np.uint8] | None, *, name: str) -> npt.NDArray[np.int64]:
    """Return the pixel values of a mask file: its numbers, or the indices of `colours` (n, 3)."""
    return read_pixels(data, name=name, colours=colours is not None).values(colours)
