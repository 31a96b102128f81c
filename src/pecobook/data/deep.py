"""Reads images with more than 8 bits per channel, and maps their values to 8 bits.

A 16-bit container often holds a camera's 12 bits, and 32-bit integers and floats have no agreed range at all. The range
of values mapped to black and white therefore belongs to the whole data set, not to an image: see
`pecobook.data.value_range`.

Pillow reads a single deep channel unchanged. For 16-bit colours it keeps only the high bytes; decoding the same file
again with swapped byte order gives the low bytes.
"""

from __future__ import annotations

import io
import math
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image

Values = npt.NDArray[np.generic]
Pixels = npt.NDArray[np.uint8]

_DEPTHS = tuple(range(8, 33, 2))
"""Bit depths of common sensors and files; as they are two bits apart, values fill a quarter of the range or more."""
_VALUES = 4096
"""Number of values per image that a survey keeps."""
_OTHERS, _DRAFT = 8, 256
"""Number of 8-bit images that a survey decodes, and the side to which it reduces JPEG images, in pixels."""
_STRIP = 2**22
"""Number of values that are mapped to 8 bits at once, which limits the memory for floats."""
_SIGNED, _BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 2, 258, 262, 339
"""A sample format of TIFF, and tags of TIFF."""
_SWAPPED = {"I;16BS": "I;16S", "I;32BS": "I;32S", "F;32BF": "F;32F"}
"""Raw modes for which Pillow forgets that libtiff has already swapped the bytes, and the right ones."""


class ValueRange(NamedTuple):
    """The values mapped to black and white; values outside become black or white too."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.10g}..{self.high:.10g}"


UNIT = ValueRange(0.0, 1.0)
"""The range of floats that lie within [0, 1]."""
FULL_16_BITS = ValueRange(0.0, 65_535.0)
"""The range of the type of 16-bit images."""


class DeepImage(NamedTuple):
    """The values of an image with more than 8 bits per channel; rows and columns are as in the file."""

    values: Values
    """(H, W, C), integers or floats; C is 1 or 3."""
    alpha: Pixels | None
    """Opacity (H, W) in 0..255, or None."""
    natural_range: ValueRange | None
    """The range that the file's type states; None for floats, 32-bit integers and signed integers."""
    is_inverted: bool = False
    """Whether low values are white (a WhiteIsZero TIFF)."""


def read_deep(image: Image, data: bytes) -> DeepImage | None:
    """Read an opened image that is not loaded yet; None for an 8-bit image. The image is loaded afterwards.

    Raises:
        ValueError: the image has 16-bit colours in a layout that cannot be read.
    """
    tile = image.tile[0] if getattr(image, "tile", None) else None  # type: ignore[attr-defined]
    decoder, arguments = (tile[0], tile[3]) if tile is not None else ("", ())
    raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    if decoder in ("ppm", "ppm_plain") and isinstance(arguments, tuple) and arguments[1] > 255:
        return _read_ppm(image, data, offset=tile[2], max_value=arguments[1], is_plain=decoder == "ppm_plain")  # type: ignore[index]
    if image.mode == "F" or image.mode.startswith("I") or is_signed_byte(image):
        if decoder == "libtiff" and raw_mode in _SWAPPED and sys.byteorder == "little":
            _set_raw_mode(image, _SWAPPED[raw_mode])
        return _read_one_channel(image)
    if isinstance(raw_mode, str) and raw_mode.endswith(
        (";16B", ";16L", ";16N")
    ):  # but not BGR;16, the colours of a BMP
        return _read_colours(image, data, raw_mode)
    if max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (8,))) > 8:
        raise ValueError("16-bit colours in separate planes are not supported")
    return None


def is_signed_byte(image: Image) -> bool:
    """Return whether a TIFF contains numbers from -128 to 127; Pillow reads those below 0 as 128 to 255."""
    return image.mode == "L" and getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT) in (_SIGNED, (_SIGNED,))


def to_8_bits(deep: DeepImage, value_range: ValueRange) -> Pixels:
    """Map values to uint8 (H, W, C): `low` becomes 0 and `high` 255, NaN becomes 0; alpha is composited on white."""
    low, high = value_range
    height, width, channels = deep.values.shape
    pixels = np.empty(deep.values.shape, np.uint8)
    rows = max(_STRIP // max(width * channels, 1), 1)
    for top in range(0, height, rows):
        part = slice(top, top + rows)
        scaled = np.nan_to_num(deep.values[part].astype(np.float64), nan=low, posinf=high, neginf=low)
        scaled = np.clip((scaled - low) / (high - low), 0, 1) * 255
        if deep.is_inverted:
            scaled = 255 - scaled
        if deep.alpha is not None:
            opacity = deep.alpha[part, :, None] / 255
            scaled = scaled * opacity + 255 * (1 - opacity)
        pixels[part] = np.rint(scaled)
    return pixels


class Survey:
    """Inspects the values of some images, in place of a range, to find the range of all images of a set.

    Attributes:
        num_deep: number of images with more than 8 bits that were seen.
    """

    def __init__(self) -> None:
        self.num_deep = 0
        self._num_others = 0
        self._low, self._high = math.inf, -math.inf
        self._is_integral = True
        self._kinds: dict[str, None] = {}  # "unit" for floats within [0, 1], "integer", "float"
        self._values: dict[bool, list[npt.NDArray[np.float64]]] = {True: [], False: []}  # a few, by whether deep

    def see(self, image: Image, data: bytes) -> None:
        """Inspect an opened image that is not loaded yet; of the 8-bit images only the first few are decoded."""
        deep = read_deep(image, data)
        if deep is not None:
            self.num_deep += 1
            self._add(deep.values)
        elif self._num_others < _OTHERS:
            self._num_others += 1
            image.draft("L", (_DRAFT, _DRAFT))
            self._values[False].append(_some(np.asarray(image.convert("L"))))

    def _add(self, values: Values) -> None:
        finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        if not finite.size:
            return
        low, high = float(finite.min()), float(finite.max())
        is_integral = finite.dtype.kind != "f" or bool((np.floor(finite) == finite).all())
        is_unit = not is_integral and low >= 0 and high <= 1
        self._kinds["unit" if is_unit else "float" if finite.dtype.kind == "f" else "integer"] = None
        self._low, self._high = min(self._low, low), max(self._high, high)
        self._is_integral &= is_integral
        self._values[True].append(_some(finite))

    def value_range(self) -> ValueRange | None:
        """Return the range of the set; None if all images seen have 8 bits.

        Integers from 0 up get the smallest even number of bits from 8 to 32 that holds them all. Floats within
        [0, 1] get 0..1. All others get their smallest and their largest value.

        Raises:
            ValueError: some images are floats within [0, 1], others are integers.
        """
        if not self.num_deep:
            return None
        if {"unit", "integer"} <= self._kinds.keys():
            raise ValueError("some images hold floats from 0 to 1, others integers")
        low, high = (self._low, self._high) if self._kinds else UNIT
        if low >= 0 and high <= 1 and "integer" not in self._kinds:
            return UNIT
        if low >= 0 and self._is_integral and high < 2 ** _DEPTHS[-1]:
            return ValueRange(0.0, 2.0 ** next(depth for depth in _DEPTHS if high < 2**depth) - 1)
        return ValueRange(low, high if high > low else low + 1)

    def share_outside(self, value_range: ValueRange) -> float:
        """Return the share of the values of deep images that lie outside of a range."""
        values = np.concatenate(self._values[True]) if self._values[True] else np.zeros(1)
        return float(((values < value_range.low) | (values > value_range.high)).mean())

    def usual_values(self) -> ValueRange | None:
        """Return the range of 99.8% of the values, of deep images if there are any; None if too few were seen."""
        values = self._values[True] or (self._values[False] if self._num_others == _OTHERS else [])
        return ValueRange(*np.quantile(np.concatenate(values), (0.001, 0.999)).tolist()) if values else None


def _some(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    flat = values.reshape(-1)
    return np.asarray(flat[:: max(flat.size // _VALUES, 1)], np.float64)


def _read_one_channel(image: Image) -> DeepImage:
    image.load()
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    natural_range = None
    if is_signed_byte(image):
        values = values.view(np.int8)
    elif image.mode.startswith("I;16"):
        natural_range = FULL_16_BITS
    elif image.mode == "I":
        sample_format = tags.get(_SAMPLE_FORMAT, 1)
        sample_format = sample_format[0] if isinstance(sample_format, tuple) else sample_format
        if tags and sample_format != _SIGNED:
            values = values.view(np.uint32)  # Pillow reads the largest values as negative numbers
        if image.format == "PPM":
            natural_range = FULL_16_BITS
    transparent = image.info.get("transparency")
    alpha = np.where(values == transparent, 0, 255).astype(np.uint8) if isinstance(transparent, int) else None
    return DeepImage(values[..., None], alpha, natural_range, is_inverted=tags.get(_PHOTOMETRIC) == 0)


def _read_ppm(image: Image, data: bytes, *, offset: int, max_value: int, is_plain: bool) -> DeepImage:
    """Read a binary PGM or PPM, whose header states the largest value, (H, W, C)."""
    width, height = image.size
    channels = 1 if image.mode == "I" else 3
    if is_plain and channels == 3:
        raise ValueError("16-bit colours in a text PPM are not supported")
    if is_plain:  # Pillow scales the values of text files to 16 bits
        image.load()
        return DeepImage(np.asarray(image)[..., None], None, FULL_16_BITS)
    count = height * width * channels
    if len(data) < offset + 2 * count:
        raise ValueError("image file is truncated")
    values = np.frombuffer(data, ">u2", count, offset).reshape(height, width, channels)
    return DeepImage(values, None, ValueRange(0, max_value))


def _read_colours(image: Image, data: bytes, raw_mode: str) -> DeepImage:
    """Read 16-bit colours, or 16-bit grey with alpha, from two 8-bit decodings."""
    transparent = image.info.get("transparency")
    if raw_mode == "LA;16B":
        _set_raw_mode(image, "RGBA")  # four bytes for each pixel: high and low of grey, high and low of alpha
        image.load()
        planes = np.asarray(image)
        return DeepImage(_join(planes[..., :1], planes[..., 1:2]), planes[..., 2], FULL_16_BITS)
    name, _, order = raw_mode.partition(";")
    if name not in ("RGB", "RGBA", "RGBX") or order not in ("16B", "16L", "16N"):
        raise ValueError(f"16-bit colours of the layout {raw_mode} are not supported")
    is_big = order == "16B" or (order == "16N" and sys.byteorder == "big")
    image.load()
    with type(image)(io.BytesIO(data)) as again:  # type: ignore[call-arg]
        _set_raw_mode(again, f"{name};16{'L' if is_big else 'B'}")
        again.load()
        low_bytes = np.asarray(again)
    high_bytes = np.asarray(image)
    values = _join(high_bytes[..., :3], low_bytes[..., :3])
    alpha = high_bytes[..., 3] if name == "RGBA" else None
    if isinstance(transparent, tuple):
        alpha = np.where((values == np.array(transparent)).all(-1), 0, 255).astype(np.uint8)
    return DeepImage(values, alpha, FULL_16_BITS)


def _join(high: Pixels, low: Pixels) -> Values:
    return high.astype(np.uint16) << 8 | low


def _set_raw_mode(image: Image, raw_mode: str) -> None:
    """Make Pillow read a file's bytes as pixels of another raw mode with the same number of bytes."""
    tiles = []
    for tile in image.tile:  # type: ignore[attr-defined]
        arguments = (raw_mode, *tile[3][1:]) if isinstance(tile[3], tuple) else raw_mode
        tiles.append((*tile[:3], arguments))
    image.tile = [type(image.tile[0])(*tile) for tile in tiles]  # type: ignore[attr-defined]
