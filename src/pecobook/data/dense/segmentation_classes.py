"""What the pixels of a mask mean: numbers or colours to classes."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pecobook.data.decode import BadImage
from pecobook.errors import ConfigError, first_line

IGNORE = -1
"""Class of a pixel that counts neither in the loss nor in a score."""
_NUMBERS = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


class WrongMask(BadImage):
    """A mask that can be read and means nothing."""


@dataclasses.dataclass(frozen=True)
class Classes:
    """What the pixels of masks mean.

    Attributes:
        names: of the classes, in the order of their numbers 0, 1, ...
        values: pixel value of each class.
        ignored: pixel values that mean nothing.
        colours: uint8 (n, 3), the colour of pixel value 0, 1, ... where masks are colour pictures, else None.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    ignored: tuple[int, ...]
    colours: npt.NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        for name in self.names:
            if self.names.count(name) > 1:
                raise ConfigError(f"Two classes are called '{name}': give each a name of its own in --classes.")
        if self.colours is not None and len(np.unique(self.colours, axis=0)) < len(self.colours):
            raise ConfigError("Two classes of --classes have one colour.")
        if len(self.names) != len(self.values) or len(set(self.values)) != len(self.values):
            raise ConfigError(
                f"--mask-values names {len(self.values)} pixel values for {len(self.names)} classes: "
                "give one value for each class, each once."
            )

    def table(self) -> npt.NDArray[np.int16]:
        """Pixel value to class: `IGNORE` for what is ignored, `IGNORE` - 1 for what no class has; int16 (65537,)."""
        table = np.full(65_537, IGNORE - 1, np.int16)
        table[list(self.ignored)] = IGNORE
        table[list(self.values)] = np.arange(len(self.values))
        return table


def decode_mask(data: bytes, colours: npt.NDArray[np.uint8] | None, *, name: str) -> npt.NDArray[np.int64]:
    """Pixel values of an encoded mask, int64 (H, W) in 0..65536.

    Grey, palette and 1-bit pictures hold numbers. Colour pictures need `colours` (n, 3): the value is the row of the
    pixel's colour, 65536 where it has none.

    Raises:
        WrongMask: a colour picture without colours.
        BadImage: not an image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "BMP", "GIF", "TIFF", "JPEG", "PPM")) as picture:
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
    packed, known = array.astype(np.int64) @ weights, colours.astype(np.int64) @ weights  # (H, W), (n,)
    order = np.argsort(known)
    place = np.searchsorted(known[order], packed).clip(0, len(known) - 1)
    return np.asarray(np.where(known[order][place] == packed, order[place], 65_536))


def _grey(array: npt.NDArray[np.uint8], name: str) -> npt.NDArray[np.uint8]:
    """A colour picture (H, W, 3) whose three channels are alike, as numbers (H, W)."""
    if (array == array[..., :1]).all():
        return array[..., 0]
    raise WrongMask(name, "is a colour picture: --classes FILE must give each class its R G B")


def read_classes(path: Path) -> tuple[tuple[str, ...], npt.NDArray[np.uint8] | None]:
    """Lines `name`, `name R G B` or `R G B name` (also with commas or tabs), in the order of pixel values.

    Raises:
        ConfigError: no such file, a blank line in between, or colours on some lines alone.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").strip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--classes '{path}' cannot be read: {first_line(error)}.") from None
    if "" in lines:
        raise ConfigError(f"--classes '{path}': line {lines.index('') + 1} is blank, and every line is a class.")
    lines = [re.sub(r"^(\d{1,3}[\s,;]+\d{1,3}[\s,;]+\d{1,3})[\s,;]+(.+)$", r"\2 \1", line) for line in lines]
    lines = [line for line in lines if not re.fullmatch(r"name\W+r\W+g\W+b", line, re.IGNORECASE)]
    found = [re.fullmatch(r"(.*?)[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})[\s,;]+(\d{1,3})", line) for line in lines]
    if not any(found):
        return tuple(lines), None
    for line, match in zip(lines, found, strict=True):
        if match is None or max(int(match[part]) for part in (2, 3, 4)) > 255:
            raise ConfigError(f"--classes '{path}': the line '{line}' is no 'name R G B' as others are.")
    matches = [match for match in found if match is not None]
    colours = np.array([[int(match[part]) for part in (2, 3, 4)] for match in matches], np.uint8)
    return tuple(match[1] for match in matches), colours


def ignored_values(ignore: Iterable[str]) -> tuple[int, ...]:
    """The pixel values among what is ignored; the rest are names. Raises ConfigError."""
    return parse_values((text for text in ignore if _NUMBERS.fullmatch(text)), flag="--ignore")


def parse_values(texts: Iterable[str], flag: str = "--mask-values") -> tuple[int, ...]:
    """`("0", "255")` or `("1-150",)` to numbers. Raises ConfigError."""
    found: list[int] = []
    for text in texts:
        match = _NUMBERS.fullmatch(text.strip())
        if match is None or int(match[2] or match[1]) > 65_535:
            raise ConfigError(f"{flag} takes pixel values and ranges of them, such as 1-150, not '{text}'.")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(found)


def make_classes(
    names: tuple[str, ...] | None, colours: Any, *, mask_values: Sequence[str], ignore: Sequence[str]
) -> Classes | None:
    """What pixels mean, as far as settings say; None when neither a class file nor --mask-values is there."""
    values = parse_values(mask_values)
    if names is None and not values:
        named = next((text for text in ignore if not _NUMBERS.fullmatch(text)), None)
        if named is not None:
            raise ConfigError(f"--ignore '{named}' is a name, and there are no names: give --classes FILE.")
        return None
    names = names or tuple(f"class {value}" for value in values)
    values = values or tuple(range(len(names)))
    # A value that was named is a class, and so is the 256th of a file, whatever the usual meaning of 255.
    numbers = set(ignored_values(ignore)) - (set(values) if mask_values else set())
    if tuple(ignore) == ("255",) and len(names) > 255:
        numbers = set()
    unknown = [text for text in ignore if not _NUMBERS.fullmatch(text) and text not in names]
    if unknown:
        raise ConfigError(f"--ignore '{unknown[0]}' is neither a pixel value nor the name of a class.")
    by_name = {value for name, value in zip(names, values, strict=False) if name in ignore}
    ignored = numbers | by_name
    if len(names) == len(values):
        kept = [(name, value) for name, value in zip(names, values, strict=True) if value not in ignored]
        names, values = tuple(name for name, _ in kept), tuple(value for _, value in kept)
    return Classes(names, values, tuple(sorted(ignored)), colours)
