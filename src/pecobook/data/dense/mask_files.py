"""Decodes a mask file to numbers, or to the indices of colours.

Grey files with fewer than 8 bits are ambiguous. The samples of a 1-bit file are 0 and 1, and so may be its class
numbers. But a program that saves small files writes a mask of 0 and 255 in this way too, since white is 255 in 8 bits:
the numbers are then stretched. `Pixels.top` tells such files apart; segmentation_check.py decides for the data set.
"""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import numpy.typing as npt

from pecobook.data.decode import BadImage, check_png, open_image, orientation_of
from pecobook.data.deep import is_signed_byte
from pecobook.errors import first_line, loading_reason

UNLISTED = 65_536
"""Value of a pixel whose colour is not listed, or whose number is larger than 65,535."""


class InvalidMask(BadImage):
    """A mask that can be read but has no valid meaning."""


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The pixels of a mask."""

    numbers: npt.NDArray[np.int64] | None
    """(H, W), 0 to `UNLISTED`; None for a colour picture."""
    colours: npt.NDArray[np.uint8]
    """(H, W, 3), the colours shown; (H, W, 0) if they were not requested."""
    top: int
    """The largest number that a grey file of its kind can hold: 1, 3 or 15 for 1, 2 or 4 bits; else 255 or more."""
    palette: tuple[int, ...] | None = None
    """R, G and B of the numbers 0, 1, ...; None for a file without a palette."""

    def values(self, listed: npt.NDArray[np.uint8] | None, *, stretched: bool = False) -> npt.NDArray[np.int64]:
        """Return the pixel values, int64 (H, W): the numbers, or the indices of the colours in `listed` (n, 3).

        Args:
            listed: colours of the values 0, 1, ...; a pixel of another colour has the value `UNLISTED`.
            stretched: whether numbers of fewer than 8 bits stand for 0 to 255.
        """
        if listed is None:
            assert self.numbers is not None
            return self.numbers * (255 // self.top) if stretched and self.top in (1, 3, 15) else self.numbers
        weights = np.array([65_536, 256, 1])
        pixels, palette = self.colours.astype(np.int64) @ weights, listed.astype(np.int64) @ weights  # (H, W), (n,)
        order = np.argsort(palette)
        position = np.searchsorted(palette[order], pixels).clip(0, len(palette) - 1)
        return np.asarray(np.where(palette[order][position] == pixels, order[position], UNLISTED))


def read_pixels(data: bytes, *, name: str, colours: bool = False) -> Pixels:
    """Decode a mask, upright by its own EXIF orientation.

    Grey, palette and 1-bit pictures have numbers as pixels, and so do colour pictures that are entirely grey.

    Args:
        data: the file's bytes.
        name: the mask's name in an error.
        colours: read the colours too. Without them a colour picture is invalid.

    Raises:
        InvalidMask: the file is a picture, but not a mask.
        BadImage: the bytes are not an image.
    """
    from PIL import Image, UnidentifiedImageError

    if data.startswith(b"\x93NUMPY"):
        return _from_numpy(data, name, colours)
    try:
        with open_image(io.BytesIO(data), name=name) as picture:
            return _pixels(picture, data, name, colours)
    except UnidentifiedImageError:
        raise BadImage(name, "not an image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(name, first_line(error)) from None


def _pixels(picture: Any, data: bytes, name: str, colours: bool) -> Pixels:
    from PIL import ImageOps

    if getattr(picture, "is_animated", False):
        raise InvalidMask(name, f"has {picture.n_frames} pages or frames: a mask has one")
    depth = _depth(picture, data)
    if depth > 8 and picture.mode in ("RGB", "RGBA", "LA"):
        raise InvalidMask(name, f"is a colour picture of {depth} bits a channel: save it with 8 bits, or as grey")
    if picture.format == "TIFF" and picture.tag_v2.get(262) == 0:  # Pillow inverts the numbers, other programs do not
        raise InvalidMask(name, "is a TIFF whose 0 is white, so that its numbers are unclear: save it as PNG")
    top = _top(picture, depth)
    if picture.format == "PNG":
        check_png(data, name)
    picture.load()
    palette = tuple(picture.getpalette("RGB") or ()) if picture.mode == "P" else None
    if orientation_of(picture) > 1:
        ImageOps.exif_transpose(picture, in_place=True)
    shown = np.asarray(picture.convert("RGB")) if colours else np.zeros((picture.height, picture.width, 0), np.uint8)
    if picture.mode in ("1", "L", "P") or picture.mode.startswith("I"):
        array = np.asarray(picture)
        numbers = (array.view(np.int8) if is_signed_byte(picture) else array).astype(np.int64)
        if top not in (1, 255) and picture.mode != "P":  # Pillow has stretched them
            numbers = np.rint(numbers * top / (255 if picture.mode == "L" else 65_535)).astype(np.int64)
    elif picture.mode == "F":
        numbers = _whole_numbers(np.asarray(picture), name)
    else:
        _check_alpha(picture, name)
        array = np.asarray(picture.convert("RGB"))
        if not (array == array[..., :1]).all():
            if not colours:
                raise InvalidMask(name, "is a colour picture: --classes FILE must give the R G B of each class")
            return Pixels(None, shown, 255)
        numbers = array[..., 0].astype(np.int64)
    if numbers.size and numbers.min() < 0:
        raise InvalidMask(name, f"holds the value {numbers.min()}, but values start at 0")
    return Pixels(numbers.clip(max=UNLISTED), shown, top, palette)


def _from_numpy(data: bytes, name: str, colours: bool) -> Pixels:
    """Read the numbers of a NumPy file that has a single grey channel."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadImage(name, loading_reason(error)) from None
    array = array.reshape([side for side in array.shape if side > 1]) if array.ndim == 3 else array
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise InvalidMask(name, f"is an array of shape {array.shape}: a mask has the numbers of height x width pixels")
    numbers = _whole_numbers(array, name)
    if numbers.size and numbers.min() < 0:
        raise InvalidMask(name, "holds a negative value, but values start at 0")
    shown = np.repeat(numbers.clip(0, 255).astype(np.uint8)[..., None], 3 if colours else 0, axis=-1)
    return Pixels(numbers, shown, 255)


def _depth(picture: Any, data: bytes) -> int:
    """Return the number of bits of a sample."""
    if picture.format == "PNG":
        return int(data[24])  # a fixed place in the header
    if picture.format == "TIFF":
        bits = picture.tag_v2.get(258, 1)
        return int(max(bits)) if isinstance(bits, tuple) else int(bits)
    return 1 if picture.mode == "1" else 8


def _top(picture: Any, depth: int) -> int:
    """Return the largest number of a grey file of this kind, see `Pixels.top`."""
    if picture.format == "PPM" and picture.mode in ("L", "I") and picture.tile:
        arguments = picture.tile[0].args  # the last one is the largest value, where Pillow stretches the numbers
        return int(arguments[-1]) if isinstance(arguments, tuple) else 255
    if picture.mode in ("1", "L") and depth < 8:
        return (1 << depth) - 1
    return 255


def _whole_numbers(array: npt.NDArray[Any], name: str) -> npt.NDArray[np.int64]:
    """Convert numbers of any type, which may have a decimal point. Raises InvalidMask for fractions."""
    if not np.isfinite(array).all() or (array != np.rint(array)).any():
        raise InvalidMask(name, "holds fractions, which are no class numbers: save it as whole numbers")
    return array.clip(-1, UNLISTED).astype(np.int64)


def _check_alpha(picture: Any, name: str) -> None:
    """Raise InvalidMask if transparency hides the class of a pixel: a transparent pixel must be black."""
    if "A" not in picture.getbands():
        return
    alpha = np.asarray(picture.getchannel("A"))
    if alpha.size and alpha.min() < alpha.max() and np.asarray(picture.convert("RGB"))[alpha < alpha.max()].any():
        raise InvalidMask(name, "has transparent pixels that are not black: save it without transparency")
