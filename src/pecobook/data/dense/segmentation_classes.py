"""Maps the pixels of a mask, which are numbers or colours, to classes."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pecobook.data.decode import BadImage, open_image, orientation_of
from pecobook.errors import ConfigError, first_line

IGNORE = -1
"""Class of a pixel that the loss and the scores ignore."""
_NUMBERS = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


class InvalidMask(BadImage):
    """A mask that can be read but has no valid meaning."""


@dataclasses.dataclass(frozen=True)
class MaskClasses:
    """The meaning of the pixels of masks.

    Attributes:
        names: names of the classes 0, 1, ...
        values: pixel value of each class.
        ignored: pixel values that belong to no class and are ignored.
        colours: uint8 (n, 3), the colours of the pixel values 0, 1, ... if masks are colour pictures, else None.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    ignored: tuple[int, ...]
    colours: npt.NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        for name in self.names:
            if self.names.count(name) > 1:
                raise ConfigError(f"Two classes are called '{name}': give each class a different name in --classes.")
        if self.colours is not None and len(np.unique(self.colours, axis=0)) < len(self.colours):
            raise ConfigError("Two classes of --classes have the same colour.")
        if len(self.names) != len(self.values) or len(set(self.values)) != len(self.values):
            raise ConfigError(
                f"--mask-values names {len(self.values)} pixel values for {len(self.names)} classes: "
                "give one distinct value for each class."
            )

    def table(self) -> npt.NDArray[np.int16]:
        """Return the class of each pixel value, int16 (65537,).

        Ignored values map to `IGNORE`, and values that are neither ignored nor of a class map to `IGNORE` - 1.
        """
        table = np.full(65_537, IGNORE - 1, np.int16)
        table[list(self.ignored)] = IGNORE
        table[list(self.values)] = np.arange(len(self.values))
        return table


def decode_mask(data: bytes, colours: npt.NDArray[np.uint8] | None, *, name: str) -> npt.NDArray[np.int64]:
    """Decode a mask to its pixel values, int64 (H, W) in 0..65536.

    The mask is turned by its own EXIF orientation, if it has one, as its image is by the image's. The pixels of grey,
    palette and 1-bit pictures are numbers. Colour pictures need `colours` (n, 3): the value of a pixel is the index of
    its colour in `colours`, or 65536 if the colour is not there.

    Raises:
        InvalidMask: the mask is a colour picture, but there are no colours.
        BadImage: the bytes are not an image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with open_image(io.BytesIO(data), name=name) as picture:
            picture.load()
            if orientation_of(picture) > 1:
                ImageOps.exif_transpose(picture, in_place=True)
            if colours is not None or picture.mode in ("1", "L", "P", "I", "I;16", "I;16B"):
                array = np.asarray(picture if colours is None else picture.convert("RGB"))
            else:
                array = _grey(np.asarray(picture.convert("RGB")), name)
    except UnidentifiedImageError:
        raise BadImage(name, "not an image") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadImage(name, first_line(error)) from None
    if colours is None:
        return np.clip(array.astype(np.int64), 0, 65_536)
    weights = np.array([65_536, 256, 1])
    pixels, palette = array.astype(np.int64) @ weights, colours.astype(np.int64) @ weights  # (H, W), (n,)
    order = np.argsort(palette)
    position = np.searchsorted(palette[order], pixels).clip(0, len(palette) - 1)
    return np.asarray(np.where(palette[order][position] == pixels, order[position], 65_536))


def _grey(array: npt.NDArray[np.uint8], name: str) -> npt.NDArray[np.uint8]:
    """Convert a colour picture (H, W, 3) with three equal channels to numbers (H, W)."""
    if (array == array[..., :1]).all():
        return array[..., 0]
    raise InvalidMask(name, "is a colour picture: --classes FILE must give the R G B of each class")


def read_classes(path: Path) -> tuple[tuple[str, ...], npt.NDArray[np.uint8] | None]:
    """Read the names and colours of classes from a file.

    Each line is `name`, `name R G B` or `R G B name` (also with commas or tabs), in the order of the pixel values.

    Returns:
        the names, and the colours uint8 (n, 3), or None if no line has a colour.

    Raises:
        ConfigError: the file cannot be read, a line is blank, or only some lines have colours.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").strip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--classes '{path}' cannot be read: {first_line(error)}.") from None
    if "" in lines:
        raise ConfigError(f"--classes '{path}': line {lines.index('') + 1} is blank, but every line must name a class.")
    lines = [re.sub(r"^(\d{1,3}[\s,;]+\d{1,3}[\s,;]+\d{1,3})[\s,;]+(.+)$", r"\2 \1", line) for line in lines]
    lines = [line for line in lines if not re.fullmatch(r"name\W+r\W+g\W+b", line, re.IGNORECASE)]
    matches = [re.fullmatch(r"(.*?)[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})", line) for line in lines]
    if not any(matches):
        return tuple(lines), None
    for line, match in zip(lines, matches, strict=True):
        if match is None or max(int(match[channel]) for channel in (2, 3, 4)) > 255:
            raise ConfigError(f"--classes '{path}': the line '{line}' is not a valid 'name R G B' like other lines.")
    complete = [match for match in matches if match is not None]
    colours = np.array([[int(match[channel]) for channel in (2, 3, 4)] for match in complete], np.uint8)
    return tuple(match[1] for match in complete), colours


def ignored_values(ignore: Iterable[str]) -> tuple[int, ...]:
    """Return the pixel values in --ignore; the other entries are names of classes. Raises ConfigError."""
    return parse_values((text for text in ignore if _NUMBERS.fullmatch(text)), flag="--ignore")


def parse_values(texts: Iterable[str], flag: str = "--mask-values") -> tuple[int, ...]:
    """Parse pixel values such as `("0", "255")` and ranges such as `("1-150",)`. Raises ConfigError."""
    values: list[int] = []
    for text in texts:
        match = _NUMBERS.fullmatch(text.strip())
        if match is None or int(match[2] or match[1]) > 65_535:
            raise ConfigError(f"{flag} takes pixel values and ranges such as 1-150, not '{text}'.")
        values += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(values)


def make_classes(
    names: tuple[str, ...] | None, colours: Any, *, mask_values: Sequence[str], ignore: Sequence[str]
) -> MaskClasses | None:
    """Make the classes that the settings define; return None if there is neither a class file nor --mask-values.

    Args:
        names: names of the classes in the class file, or None.
        colours: uint8 (n, 3), the colours in the class file, or None.
        mask_values: the entries of --mask-values.
        ignore: the entries of --ignore, pixel values or names of classes.

    Raises:
        ConfigError: the settings are invalid or contradict each other.
    """
    values = parse_values(mask_values)
    if names is None and not values:
        ignored_name = next((text for text in ignore if not _NUMBERS.fullmatch(text)), None)
        if ignored_name is not None:
            raise ConfigError(
                f"--ignore '{ignored_name}' is a name, but the classes have no names: give --classes FILE."
            )
        return None
    names = names or tuple(f"class {value}" for value in values)
    values = values or tuple(range(len(names)))
    # A value in --mask-values is a class, and so is the 256th class of a file, although 255 is usually ignored.
    numbers = set(ignored_values(ignore)) - (set(values) if mask_values else set())
    if tuple(ignore) == ("255",) and len(names) > 255:
        numbers = set()
    unknown = [text for text in ignore if not _NUMBERS.fullmatch(text) and text not in names]
    if unknown:
        raise ConfigError(f"--ignore '{unknown[0]}' is neither a pixel value nor the name of a class.")
    values_of_names = {value for name, value in zip(names, values, strict=False) if name in ignore}
    ignored = numbers | values_of_names
    if len(names) == len(values):
        classes = [(name, value) for name, value in zip(names, values, strict=True) if value not in ignored]
        names, values = tuple(name for name, _ in classes), tuple(value for _, value in classes)
    return MaskClasses(names, values, tuple(sorted(ignored)), colours)
