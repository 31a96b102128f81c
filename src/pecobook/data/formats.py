"""Formats of images that Pillow does not know by itself, as plugins of Pillow: NumPy's .npy, and HEIC.

With a plugin, such a file has a size, a mode and a limit on pixels as every image has, and 16-bit values keep their
range.
"""

from __future__ import annotations

import functools
from typing import IO

import numpy as np
from PIL import Image, ImageFile

# (type, number of channels) -> Pillow's mode, and its name for the layout of the bytes
_ARRAYS = {
    ("|u1", 1): ("L", "L"),
    ("|u1", 3): ("RGB", "RGB"),
    ("|u1", 4): ("RGBA", "RGBA"),
    ("<u2", 1): ("I;16", "I;16"),
    (">u2", 1): ("I;16B", "I;16B"),
    ("<u2", 3): ("RGB", "RGB;16L"),
    (">u2", 3): ("RGB", "RGB;16B"),
    ("<f4", 1): ("F", "F;32F"),
    (">f4", 1): ("F", "F;32BF"),
}
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})


@functools.cache
def register() -> None:
    """Teach Pillow the formats of this module."""
    Image.init()
    Image.register_open(NumpyFile.format, NumpyFile, lambda prefix: prefix.startswith(b"\x93NUMPY"))
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        Image.register_open(_MissingHeic.format, _MissingHeic, lambda prefix: _brand(prefix) in _HEIC_BRANDS)
    else:
        register_heif_opener()
    if "AVIF" not in Image.OPEN:
        Image.register_open(_MissingAvif.format, _MissingAvif, lambda prefix: _brand(prefix) in _AVIF_BRANDS)


def _brand(prefix: bytes) -> bytes:
    return prefix[8:12] if prefix[4:8] == b"ftyp" else b""


class NumpyFile(ImageFile.ImageFile):
    """An array of shape (H, W), (H, W, 1), (H, W, 3) or, with alpha, (H, W, 4), as `numpy.save` writes it."""

    format = "NUMPY"
    format_description = "NumPy array"

    def _open(self) -> None:
        assert self.fp is not None
        shape, is_fortran, dtype = _read_header(self.fp)
        channels = shape[2] if len(shape) == 3 else 1
        modes = _ARRAYS.get((dtype.str, channels)) if len(shape) in (2, 3) else None
        if modes is None or is_fortran or 0 in shape:
            order = " in the order of Fortran" if is_fortran else ""
            raise ValueError(
                f"an array of {dtype} {shape}{order} is no image; it must be uint8 or uint16 (H, W) or "
                "(H, W, 3), or float32 (H, W)"
            )
        self._size, (self._mode, raw_mode) = (shape[1], shape[0]), modes
        self.tile = [ImageFile._Tile("raw", (0, 0, *self._size), self.fp.tell(), (raw_mode, 0, 1))]


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    is_first_version = np.lib.format.read_magic(file) == (1, 0)
    read = np.lib.format.read_array_header_1_0 if is_first_version else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(file)
    return shape, is_fortran, dtype


class _MissingHeic(ImageFile.ImageFile):
    format = "HEIF"

    def _open(self) -> None:
        raise ValueError("HEIC images need pillow-heif: pip install 'pecobook[heic]'")


class _MissingAvif(ImageFile.ImageFile):
    format = "AVIF"

    def _open(self) -> None:
        raise ValueError("AVIF images need Pillow 11.3 or newer")
