"""Checks every pair of image and mask before training, so that errors are found before a run takes hours."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import numpy as np

from pecobook.data.decode import BadImage
from pecobook.data.dense.mask_files import UNLISTED, InvalidMask
from pecobook.data.dense.mask_meaning import MaskReport, settle_meaning
from pecobook.data.dense.segmentation import SegmentationSource
from pecobook.data.dense.segmentation_classes import MaskClasses, MaskCounts, pixels_per_value, sum_masks
from pecobook.data.source import Note, Splits
from pecobook.errors import grouped, some_of
from pecobook.utils.devices import cores

_NO_CLASS = frozenset(("void", "ignore", "ignored", "unlabelled", "unlabeled", "unknown", "dontcare", "don't care"))


@dataclasses.dataclass(frozen=True)
class VerificationResult:
    """The result of `verify`.

    Attributes:
        splits: the valid pairs, with known classes; its notes end with those of this check.
        problems: a line for each reason why pairs are invalid, with the first mask and the number of further ones.
        unreadable: the same for pairs whose image or mask cannot be read.
        num_problems: number of invalid pairs.
        num_unreadable: number of pairs whose image or mask cannot be read.
        notes: sentences on what was assumed, and on classes without a pixel.
        fault: why nothing can be learned from these masks; empty if something can.
        hint: what the problems have in common; may be empty.
    """

    splits: Splits
    problems: tuple[str, ...]
    unreadable: tuple[str, ...]
    num_problems: int
    num_unreadable: int
    notes: tuple[str, ...]
    fault: str
    hint: str


def verify(
    splits: Splits, show: Callable[[int], None] = lambda _done: None, *, limit: int | None = None
) -> VerificationResult:
    """Read every mask and the header of its image once, on all cores, and remove invalid pairs.

    A pair is invalid if the sizes of image and mask differ, if the mask has values without a class, or if the image or
    the mask cannot be read.

    Args:
        splits: the splits that `open_segmentation` returns.
        show: called with the number of checked pairs after each pair.
        limit: read only this number of pairs of each split, evenly spread, to learn what the pixels mean; no pair is
            then removed or reported.

    Raises:
        ConfigError: without given classes, masks hold only the values 0 and 255, and 255 is ignored.
        DataError: without given classes, the values of the masks do not define classes; or it is unclear what the
            numbers of grey files of fewer than 8 bits mean.
    """
    sources = [cast("SegmentationSource", part) for part in (splits.train, splits.evaluation)]
    reports = _check_pairs(sources, show, limit)
    meaning, notes = settle_meaning(splits.train.name, sources[0].mask_classes, reports)
    problems: list[BadImage] = []
    unreadable: list[BadImage] = []
    valid: list[SegmentationSource] = []
    counts: list[MaskCounts] = []
    for source, source_reports in zip(sources, reports, strict=True):
        invalid = {n: reason for n, report in enumerate(source_reports) if (reason := _problem(report, meaning))}
        part = source.with_mask_classes(meaning)
        kept = [n for n, report in enumerate(source_reports) if not (report.reason or report.unreadable)]
        if limit is None:
            kept = [n for n in kept if n not in invalid]
            problems += [BadImage(source.identify_mask(number), reason) for number, reason in invalid.items()]
            part = part.subset(kept)
            part.unreadable = [report.unreadable for report in source_reports if report.unreadable]
            unreadable += part.unreadable
            found = Counter({"pairs that do not fit": len(invalid), "pairs that cannot be read": len(part.unreadable)})
            part.left_out = part.left_out | +found
        valid.append(part)
        counts.append(sum_masks(meaning, [source_reports[n].counts(meaning) for n in kept]))
        part.counts = counts[-1] if limit is None else None
    train, evaluation = counts
    notes = [*notes, *_notes_on_content(train, evaluation, limit)]
    if len(valid[0]) and re.search(r"\.jpe?g\)?$", first := valid[0].identify_mask(0), re.IGNORECASE):
        notes.append(f"'{first}' is a JPEG, which changes the values of pixels at edges: save masks as PNG.")
    return VerificationResult(
        splits=dataclasses.replace(splits, train=valid[0], evaluation=valid[1], notes=(*splits.notes, *notes)),
        problems=grouped(((bad.reason, f"{bad.name} {bad.reason}") for bad in problems), "more alike"),
        unreadable=grouped(((bad.reason, f"{bad.name}: {bad.reason}") for bad in unreadable), "more alike"),
        num_problems=len(problems),
        num_unreadable=len(unreadable),
        notes=tuple(notes),
        fault="" if limit is not None else _fault(splits.train.name, train, meaning),
        hint=_hint(reports[0], meaning, problems[0]) if problems else "",
    )


def _check_pairs(
    sources: Iterable[SegmentationSource], show: Callable[[int], None], limit: int | None
) -> list[list[MaskReport]]:
    from concurrent.futures import ThreadPoolExecutor

    reports = []
    done = 0
    with ThreadPoolExecutor(max_workers=len(cores())) as pool:
        for source in sources:
            count = len(source) if limit is None else min(limit, len(source))
            numbers = np.linspace(0, len(source) - 1, count).round().astype(np.int64).tolist()
            source_reports = []
            for report in pool.map(partial(_check_pair, source), numbers):
                source_reports.append(report)
                show(done := done + 1)
            reports.append(source_reports)
    return reports


def _check_pair(source: SegmentationSource, number: int) -> MaskReport:
    listed = source.mask_classes.colours
    try:
        pixels = source.read_pixels(number)
        size = source.header_size(number)
    except InvalidMask as error:
        return MaskReport(reason=error.reason)
    except BadImage as error:
        return MaskReport(unreadable=error)
    if pixels.colours.shape[:2] != size:
        height, width = pixels.colours.shape[:2]
        turned = " after its EXIF orientation, which the mask may lack" if (height, width) == size[::-1] else ""
        return MaskReport(reason=f"is {width} x {height}, but its image is {size[1]} x {size[0]}{turned}")
    numbers = None if pixels.numbers is None else pixels_per_value(pixels.numbers)
    palette = pixels.palette
    values = None if listed is None else pixels.values(listed)
    unlisted = [] if values is None else pixels.colours[values == UNLISTED][:1].ravel().tolist()
    return MaskReport(
        numbers=numbers,
        palette=None if palette is None else {n: palette[3 * n : 3 * n + 3] for n in numbers or {}},
        by_colour=None if values is None else pixels_per_value(values),
        unlisted=" ".join(map(str, unlisted)),
        top=pixels.top,
    )


def _problem(report: MaskReport, meaning: MaskClasses) -> str:
    """Return why a pair is invalid, or an empty text."""
    unexpected = sorted(report.counts(meaning).keys() - {*meaning.values, *meaning.ignored})
    if report.reason or not unexpected:
        return report.reason
    if meaning.colours is not None:
        return f"has colours that --classes does not list, such as {report.unlisted}"
    return (
        f"holds the value {unexpected[0]}, but the {len(meaning.names)} classes have the values "
        f"{min(meaning.values)} to {max(meaning.values)}"
    )


def _hint(reports: list[MaskReport], meaning: MaskClasses, problem: BadImage) -> str:
    """Return a remedy for masks saved as JPEG, or with one value more than the classes, such as an unlabelled 0."""
    if re.search(r"\.jpe?g\)? holds the value", f"{problem.name} {problem.reason}", re.IGNORECASE):
        return "JPEG changes the values of a mask: save masks as PNG, without interpolation.\n"
    count = len(meaning.names)
    met = {value for report in reports for value in report.counts(meaning)} - set(meaning.ignored)
    if meaning.colours is not None or not met - set(meaning.values):
        return ""
    if meaning.values != tuple(range(count)) or max(met) != count:
        if 2 * sum(bool(_problem(report, meaning)) for report in reports) <= len(reports):
            return ""  # single masks are wrong
        seen = sorted({value for report in reports for value in report.counts(meaning)})
        if len(seen) == count:  # 255 among them is a class too
            listed_values = " ".join(map(str, seen))
            return f"If the values are the {count} classes in order, give --mask-values {listed_values}.\n"
        values = some_of(sorted(met), 20)
        return f"The training masks hold the values {values}; --mask-values states the value of each class.\n"
    others = " ".join(str(value) for value in meaning.ignored if value != 0)
    return (
        f"The masks hold values up to {count} for {count} classes: if 0 means no class, give --mask-values 1-{count} "
        f"--ignore 0; if {count} means none, give --ignore {others} {count}.\n"
    )


def _notes_on_content(train: MaskCounts, evaluation: MaskCounts, limit: int | None) -> list[str]:
    """Return a note on classes without a pixel, and on pixels that do not count."""
    notes: list[str] = []
    if not train.masks:
        return notes
    masks = "training masks" if limit is None else "sampled training masks"
    missing = [name for name, count in train.classes.items() if not count]
    if missing:
        total = f"{len(missing)} of {len(train.classes)} classes have no pixel in the {masks}"
        notes.append(Note(f"{total}, and are not learned: {some_of(missing)}.", "empty classes"))
    missing = [name for name, count in evaluation.classes.items() if not count]
    if missing and limit is None:
        total = f"{len(missing)} of {len(evaluation.classes)} classes have no pixel in the held-out masks"
        rest = len(evaluation.classes) - len(missing)
        notes.append(f"{total}, so that the mean IoU is over the other {rest}: {some_of(missing)}.")
    void = [name for name, count in train.classes.items() if count and name.strip("_").lower() in _NO_CLASS]
    if void:
        notes.append(
            f"The class '{void[0]}' is learned and counts in the mean IoU: --ignore 255 '{void[0]}' leaves it out."
        )
    pixels = sum(train.values.values())
    if 2 * train.ignored > pixels:
        notes.append(f"{100 * train.ignored / pixels:.0f}% of the pixels of the {masks} are ignored.")
    return notes


def _fault(name: str, train: MaskCounts, meaning: MaskClasses) -> str:
    """Return why nothing can be learned: fewer than two classes have a pixel in training."""
    present = [f"'{text}' alone" for text, count in train.classes.items() if count]
    if len(present) > 1 or not train.masks:
        return ""
    total = sum(train.values.values())
    ignored = set(meaning.ignored)
    met = ", ".join(
        f"{value} ({100 * count / total:.0f}%{', ignored' if value in ignored else ''})"
        for value, count in list(train.values.items())[:6]
    )
    unit = "values" if meaning.colours is None else "lines of --classes"
    remedy = (
        "If another value marks a class, name the value of every class in --mask-values (such as 0 255), and what "
        "means no class in --ignore."
        if len(train.classes) > 1
        else "Give the file of classes a line for each class, in the order of their values: 'background' is one, too."
    )
    return (
        f"--data '{name}': {present[0] if present else 'no class'} has pixels in the training masks, so that "
        f"there is nothing to learn; {unit} met: {met}.\n{remedy}"
    )
