"""Decides what the pixels of a data set's masks mean, if a single mask does not show it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from pecobook.data.decode import BadImage
from pecobook.data.dense.segmentation_classes import MaskClasses
from pecobook.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class MaskReport:
    """The content of one mask, or why it is invalid or cannot be read."""

    numbers: dict[int, int] | None = None
    """Number -> number of pixels; None for a colour picture."""
    by_colour: dict[int, int] | None = None
    """Index of the colour in the class file -> number of pixels; None if the class file has no colours."""
    top: int = 255
    """The largest number that a file of this kind can hold (see mask_files.py)."""
    palette: dict[int, tuple[int, ...]] | None = None
    """Number -> R, G and B, for the numbers in a mask with a palette."""
    unlisted: str = ""
    """R, G and B of a pixel whose colour the class file does not list."""
    reason: str = ""
    unreadable: BadImage | None = None

    def counts(self, meaning: MaskClasses) -> dict[int, int]:
        """Return pixel value -> number of pixels."""
        if meaning.colours is not None:
            return self.by_colour or {}
        return self.stretched() if meaning.stretched else self.numbers or {}

    def stretched(self) -> dict[int, int]:
        """Return the counts of the numbers, with those of a file with few bits stretched to 0 to 255."""
        factor = 255 // self.top if self.is_shallow else 1
        return {number * factor: count for number, count in (self.numbers or {}).items()}

    @property
    def is_shallow(self) -> bool:
        """Whether the file is grey and has 1, 2 or 4 bits."""
        return self.top in (1, 3, 15)


def settle_meaning(
    name: str, meaning: MaskClasses, reports: Sequence[Sequence[MaskReport]]
) -> tuple[MaskClasses, list[str]]:
    """Return the meaning of the masks' pixels, and a sentence on each decision.

    Args:
        name: the source as the user wrote it.
        meaning: what the settings say; without names the classes are the values in the training masks.
        reports: the reports on the training masks and on the held-out masks.

    Raises:
        ConfigError: without given classes, masks hold only 0 and 255, and 255 is ignored.
        DataError: the values of the masks do not define classes.
    """
    notes: list[str] = []
    used = [report for part in reports for report in part if not report.reason and not report.unreadable]
    if meaning.colours is not None and _are_numbers(meaning, used):
        meaning = dataclasses.replace(meaning, colours=None)
        notes.append("The masks hold the numbers of the classes, so that the colours of --classes are left aside.")
    if meaning.colours is None and any(report.is_shallow for report in used):
        meaning = dataclasses.replace(meaning, stretched=_is_stretched(name, meaning, used))
        shallow = [report for report in used if report.is_shallow]
        white = "255 in white" if meaning.stretched else "the numbers as stored, 1 in a white pixel of one bit"
        notes.append(f"{len(shallow):,} of {len(used):,} masks are grey files of fewer than 8 bits: they hold {white}.")
    if meaning.colours is None:
        _check_palettes(name, used)
    values = {value for report in used for value in report.counts(meaning)}
    if not meaning.names:
        reasons = [report.reason or str(report.unreadable or "") for report in reports[0]]
        if reasons and all(reasons):
            raise DataError(
                f"--data '{name}': none of {len(reasons):,} training masks can be used; the first {reasons[0]}."
            )
        return _infer_classes(name, meaning, reports[0]), notes
    is_default = meaning.values == (0, 1) and 255 in meaning.ignored and meaning.colours is None
    if is_default and len(meaning.names) == 2 and 255 in values and values <= {0, 255}:
        notes.append(f"The masks hold only 0 and 255: 255 is read as '{meaning.names[1]}', and no pixel is ignored.")
        meaning = dataclasses.replace(meaning, values=(0, 255), ignored=())
    elif is_default and len(meaning.names) == 2 and 255 in values:
        masks = [report.counts(meaning).keys() & {1, 255} for report in used]
        ones, whites = masks.count({1}), masks.count({255})
        if ones and whites and {1, 255} not in masks:
            text = (
                f"{ones:,} masks hold 1 and never 255, and {whites:,} hold 255, which is ignored, and never 1: if both "
                f"mean '{meaning.names[1]}', save all masks with the same values."
            )
            if len(used) >= 10 and 10 * min(ones, whites) >= len(used):  # ignored pixels lie next to objects
                raise DataError(f"--data '{name}': {text}")
            notes.append(text)
    return meaning, notes


def _are_numbers(meaning: MaskClasses, reports: Iterable[MaskReport]) -> bool:
    """Return whether most masks do not match the listed colours, but all are pictures of class numbers."""
    allowed = {*meaning.values, *meaning.ignored}
    num_fitting = total = 0
    for report in reports:
        if report.numbers is None or not report.numbers.keys() <= allowed:
            return False
        num_fitting += (report.by_colour or {}).keys() <= allowed
        total += 1
    return 2 * num_fitting < total


def _is_stretched(name: str, meaning: MaskClasses, reports: Sequence[MaskReport]) -> bool:
    """Return whether grey files with fewer than 8 bits stand for 0 to 255, as the other masks and the classes show."""
    shallow = [report for report in reports if report.is_shallow]
    stored = {number for report in shallow for number in report.numbers or {}} - {0}
    stretched = {number for report in shallow for number in report.stretched()} - {0}
    if not stored:
        return False
    others = {number for report in reports if not report.is_shallow for number in report.numbers or {}} - {0}
    fits, fits_stretched = stored <= others, stretched <= others
    if fits == fits_stretched and meaning.names:
        allowed = {*meaning.values, *meaning.ignored}
        fits, fits_stretched = stored <= allowed, stretched <= allowed
    if fits != fits_stretched:
        return fits_stretched
    if fits and others:
        raise DataError(
            f"--data '{name}': {len(shallow)} masks are grey files of 1, 2 or 4 bits, whose white may mean "
            f"{max(stored)} or {max(stretched)}, since classes or other masks have both. Save all masks with 8 bits."
        )
    return False


def _check_palettes(name: str, reports: Sequence[MaskReport]) -> None:
    """Raise DataError if the palettes of the masks have the same colours in another order, as programs that save small
    files write them: the numbers then do not mean the same in all files.
    """
    colours: dict[int, set[tuple[int, ...]]] = {}
    numbers: dict[tuple[int, ...], set[int]] = {}
    is_grey_beside_grey = False
    has_grey_files = any(report.palette is None for report in reports)
    for report in reports:
        for number, colour in (report.palette or {}).items():
            colours.setdefault(number, set()).add(colour)
            numbers.setdefault(colour, set()).add(number)
        levels = {number: set(colour) for number, colour in (report.palette or {}).items()}
        is_grey = all(len(level) == 1 for level in levels.values())
        is_grey_beside_grey |= has_grey_files and is_grey and any(level != {n} for n, level in levels.items())
    are_shuffled = any(len(found) > 1 for found in colours.values()) and any(len(n) > 1 for n in numbers.values())
    if are_shuffled or is_grey_beside_grey:
        raise DataError(
            f"--data '{name}': the palettes of the masks differ, so that a number means one colour here and another "
            "there. Save all masks as grey PNG of class numbers, or give the colours in --classes (name R G B)."
        )


def _infer_classes(name: str, meaning: MaskClasses, reports: Iterable[MaskReport]) -> MaskClasses:
    """Return the classes 0 to the largest value of any training mask."""
    ignored = set(meaning.ignored)
    met = {value for report in reports for value in report.counts(meaning)}
    if met <= {0, 255} and 255 in met and 255 in ignored:
        raise ConfigError(
            f"--data '{name}': masks hold only 0 and 255, and 255 is ignored. If 255 marks the object, "
            "give --mask-values 0 255."
        )
    used = met - ignored
    largest = max(used, default=0)
    if largest < 1 or largest > 191 or len(used) < (largest + 1) / 2:
        raise DataError(
            f"--data '{name}': masks hold {len(used)} values up to {largest}, which define no "
            "classes. Give --classes FILE with a name on each line, or --mask-values. Masks that were interpolated or "
            "saved as JPEG hold values that belong to no class: save them as PNG, without interpolation."
        )
    values = tuple(value for value in range(largest + 1) if value not in ignored)
    names = tuple(f"class {value}" for value in values)
    return dataclasses.replace(meaning, names=names, values=values)
