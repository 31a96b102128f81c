"""Maps the pixels of a mask, which are numbers or colours, to classes, and counts them."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pecobook.data.dense.class_files import ClassFile
from pecobook.errors import ConfigError

IGNORE = -1
"""Class of a pixel that the loss and the scores ignore."""
_NUMBERS = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class MaskClasses:
    """The meaning of the pixels of masks.

    Attributes:
        names: names of the classes 0, 1, ...
        values: pixel value of each class.
        ignored: pixel values that belong to no class and are ignored.
        colours: uint8 (n, 3), the colours of the pixel values 0, 1, ... if masks are colour pictures, else None.
        stretched: whether grey files of 1, 2 or 4 bits stand for the numbers 0 to 255 (see mask_files.py).
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    ignored: tuple[int, ...]
    colours: npt.NDArray[np.uint8] | None = None
    stretched: bool = False

    def __post_init__(self) -> None:
        for name in self.names:
            if self.names.count(name) > 1:
                raise ConfigError(f"Two classes are called '{name}': give each class a different name in --classes.")
        if self.colours is not None and len(np.unique(self.colours, axis=0)) < len(self.colours):
            raise ConfigError("Two classes of --classes have the same colour.")
        if len(self.names) != len(self.values) or len(set(self.values)) != len(self.values):
            raise ConfigError(
                f"--mask-values names {len(self.values)} pixel values, and the file of classes {len(self.names)}: "
                "give one distinct value for each class, and a name, such as background, for each value."
            )

    def table(self) -> npt.NDArray[np.int16]:
        """Return the class of each pixel value, int16 (65537,).

        Ignored values map to `IGNORE`, and values that are neither ignored nor those of a class map to `IGNORE` - 1.
        """
        table = np.full(65_537, IGNORE - 1, np.int16)
        table[list(self.ignored)] = IGNORE
        table[list(self.values)] = np.arange(len(self.values))
        return table


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


def make_classes(file: ClassFile | None, *, mask_values: Sequence[str], ignore: Sequence[str]) -> MaskClasses | None:
    """Make the classes that the settings define; return None if there is neither a class file nor --mask-values.

    Args:
        file: the content of the class file, or None. --mask-values overrides its pixel values.
        mask_values: the entries of --mask-values.
        ignore: the entries of --ignore, pixel values or names of classes.

    Raises:
        ConfigError: the settings are invalid or contradict each other.
    """
    names, colours = (file.names, file.colours) if file else (None, None)
    values = parse_values(mask_values) or (file.values if file and file.values else ())
    are_stated = bool(values)
    if names is None and not values:
        ignored_name = next((text for text in ignore if not _NUMBERS.fullmatch(text)), None)
        if ignored_name is not None:
            raise ConfigError(
                f"--ignore '{ignored_name}' is a name, but the classes have no names: give --classes FILE."
            )
        return None
    names = names or tuple(f"class {value}" for value in values)
    values = values or tuple(range(len(names)))
    # A stated value is a class, and so is the 256th class of a file, although 255 is usually ignored.
    numbers = {*ignored_values(ignore), *(file.ignored if file else ())} - (set(values) if are_stated else set())
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


# ----------------------------------------------------------------------------------------------------- counts of pixels


@dataclasses.dataclass(frozen=True)
class MaskCounts:
    """The content of some masks.

    Attributes:
        masks: number of masks.
        values: pixel value -> number of pixels, as the files have them; with colours, a value is the line of the colour
            in the class file, and 65536 stands for every other colour.
        classes: name of the class -> number of pixels.
        ignored: number of pixels that count neither in the loss nor in the scores.
    """

    masks: int
    values: dict[int, int]
    classes: dict[str, int]
    ignored: int


def pixels_per_value(values: npt.NDArray[np.int64]) -> dict[int, int]:
    """Return the number of pixels of each value in a mask (H, W)."""
    counts = np.bincount(values.ravel())
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def pixels_per_class(meaning: MaskClasses, values: Mapping[int, int]) -> dict[str, int]:
    """Return the number of pixels of each class, given that of each value."""
    return {name: values.get(value, 0) for name, value in zip(meaning.names, meaning.values, strict=True)}


def sum_masks(meaning: MaskClasses, masks: Iterable[dict[int, int]]) -> MaskCounts:
    """Add the counts of several masks, each of which has its number of pixels by value."""
    total: Counter[int] = Counter()
    number = 0
    for mask in masks:
        number += 1
        total.update(mask)
    return MaskCounts(
        masks=number,
        values=dict(sorted(total.items())),
        classes=pixels_per_class(meaning, total),
        ignored=sum(total[value] for value in meaning.ignored),
    )
