"""Pillow plugins for image formats that Pillow itself does not read: .npy, HEIC, and more types in TIFF.

With a plugin, such a file has a size, a mode and a limit on pixels as every image has, and 16-bit values keep their
range.
"""

from __future__ import annotations

import functools
import io
import logging
from typing import Any

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
_TIFF_SIGNATURES = frozenset({b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"})
# kind of number -> Pillow's mode, its name for the layout of the bytes, and the type in this layout
_TIFF_LAYOUTS = {"f": ("F", "F;32F", "<f4"), "i": ("I", "I;32S", "<i4"), "u": ("I", "I;32S", "<u4")}
_PHOTOMETRIC, _ORIENTATION, _SAMPLE_FORMAT = 262, 274, 339  # tags
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})


@functools.cache
def register() -> None:
    """Register the formats of this module with Pillow."""
    Image.init()
    Image.register_open(DeepTiff.format, DeepTiff, lambda prefix: prefix[:4] in _TIFF_SIGNATURES)
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
        is_first_version = np.lib.format.read_magic(self.fp) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if is_first_version else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read(self.fp)
        channels = shape[2] if len(shape) == 3 else 1
        modes = _ARRAYS.get((dtype.str, channels)) if len(shape) in (2, 3) else None
        if modes is None or is_fortran or 0 in shape:
            order = " in the order of Fortran" if is_fortran else ""
            needed = "uint8 or uint16 (H, W) or (H, W, 3), or float32 (H, W)"
            raise ValueError(f"an array of {dtype} {shape}{order} is no image; it must be {needed}")
        self._size, (self._mode, raw_mode) = (shape[1], shape[0]), modes
        self.tile = [ImageFile._Tile("raw", (0, 0, *self._size), self.fp.tell(), (raw_mode, 0, 1))]


class DeepTiff(ImageFile.ImageFile):
    """A TIFF with one channel of a type that Pillow does not read, such as 64-bit floats: tifffile reads it."""

    format = "DEEPTIFF"
    format_description = "TIFF of other types"

    def _open(self) -> None:
        page = self._page()
        dtype = page.dtype
        if page.axes != "YX" or dtype is None or dtype.kind not in "iuf":
            raise ValueError(f"a TIFF of {dtype} {page.shape} is not read: save it as grey or RGB of 8 or 16 bits")
        kind = dtype.kind if dtype.itemsize <= 4 else "f"
        self._layout = ("I;16", "I;16", "<u2") if dtype.str[1:] == "u2" else _TIFF_LAYOUTS[kind]
        self._size, self._mode = (page.imagewidth, page.imagelength), self._layout[0]
        self.tag_v2 = {_PHOTOMETRIC: int(page.photometric), _SAMPLE_FORMAT: 2 if kind == "i" else 1}
        exif = Image.Exif()
        exif[_ORIENTATION] = int(page.tags.valueof(_ORIENTATION, 1))
        self.info["exif"] = exif.tobytes()

    def load(self) -> Any:
        """Read the first page with tifffile, and give its values to Pillow."""
        if not self.tile and self._im is None:
            _, raw_mode, dtype = self._layout
            self.fp = io.BytesIO(self._page().asarray().astype(dtype).tobytes())
            self.tile = [ImageFile._Tile("raw", (0, 0, *self._size), 0, (raw_mode, 0, 1))]
        return super().load()

    def _page(self) -> Any:
        import tifffile

        logging.getLogger("tifffile").disabled = True  # it reports damage, which becomes the reason of a bad image
        assert self.fp is not None
        self.fp.seek(0)
        try:
            return tifffile.TiffFile(io.BytesIO(self.fp.read())).pages.first
        except Exception as error:  # a damaged file may raise any exception
            raise SyntaxError(str(error)) from error


class _MissingHeic(ImageFile.ImageFile):
    format = "HEIF"

    def _open(self) -> None:
        raise ValueError("HEIC images need pillow-heif: pip install 'pecobook[heic]'")


class _MissingAvif(ImageFile.ImageFile):
    format = "AVIF"

    def _open(self) -> None:
        raise ValueError("AVIF images need Pillow 11.3 or newer")
