"""Checks every pair of image and mask before training, so that errors are found before a run takes hours."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import cast

import numpy as np

from pecobook.data.decode import BadImage
from pecobook.data.dense.segmentation import SegmentationSource
from pecobook.data.dense.segmentation_classes import InvalidMask, MaskClasses
from pecobook.data.source import Splits
from pecobook.errors import ConfigError, DataError
from pecobook.utils.devices import cores


@dataclasses.dataclass(frozen=True)
class VerificationResult:
    """The result of `verify`.

    Attributes:
        splits: the valid pairs, with known classes.
        problems: a line for each invalid pair.
        unreadable: a line for each pair whose image or mask cannot be read.
    """

    splits: Splits
    problems: tuple[str, ...]
    unreadable: tuple[str, ...]


def verify(splits: Splits, show: Callable[[int], None] = lambda _done: None) -> VerificationResult:
    """Read every mask and the header of its image once, on all cores, and remove invalid pairs.

    A pair is invalid if the sizes of image and mask differ, if the mask has values without a class, or if the image or
    the mask cannot be read.

    Args:
        splits: the splits that `open_segmentation` returns.
        show: called with the number of checked pairs after each pair.

    Raises:
        ConfigError: without given classes, masks hold only the values 0 and 255, and 255 is ignored.
        DataError: without given classes, the values of the masks do not define classes.
    """
    from concurrent.futures import ThreadPoolExecutor

    sources = [cast("SegmentationSource", part) for part in (splits.train, splits.evaluation)]
    reports: list[list[_PairReport]] = []
    done = 0
    with ThreadPoolExecutor(max_workers=len(cores())) as pool:
        for source in sources:
            source_reports = []
            for report in pool.map(partial(_check_pair, source), range(len(source))):
                source_reports.append(report)
                show(done := done + 1)
            reports.append(source_reports)
    mask_classes = sources[0].mask_classes
    if not mask_classes.names:
        mask_classes = _infer_classes(splits, reports)
    allowed = {*mask_classes.values, *mask_classes.ignored}
    problems, unreadable = [], []
    valid: list[SegmentationSource] = []
    for source, source_reports in zip(sources, reports, strict=True):
        invalid = {
            number: reason
            for number, report in enumerate(source_reports)
            if (reason := report.problem(allowed, mask_classes))
        }
        problems += [f"{source.identify_mask(number)} {reason}" for number, reason in invalid.items()]
        unreadable += [report.unreadable for report in source_reports if report.unreadable]
        part = source.subset(n for n, r in enumerate(source_reports) if n not in invalid and not r.unreadable)
        num_unreadable = sum(bool(report.unreadable) for report in source_reports)
        for reason, count in (("pairs that do not fit", len(invalid)), ("pairs that cannot be read", num_unreadable)):
            part.left_out |= {reason: count} if count else {}
        valid.append(part)
    train, evaluation = (source.with_mask_classes(mask_classes) for source in valid)
    return VerificationResult(Splits(train, evaluation, splits.evaluation_name), tuple(problems), tuple(unreadable))


@dataclasses.dataclass(frozen=True)
class _PairReport:
    """The result of checking one pair: the mask's values, the reason why it is invalid, or the error of reading it."""

    values: frozenset[int] = frozenset()
    reason: str = ""
    unreadable: str = ""

    def problem(self, allowed: set[int], mask_classes: MaskClasses) -> str:
        unexpected = sorted(self.values - allowed)
        if self.reason or not unexpected:
            return self.reason
        if mask_classes.colours is not None:
            return "has colours that --classes does not list"
        last = max(mask_classes.values, default=0)
        return (
            f"holds the value {unexpected[0]}, but the {len(mask_classes.names)} classes have the values "
            f"{min(mask_classes.values)} to {last}"
        )


def _check_pair(source: SegmentationSource, number: int) -> _PairReport:
    try:
        values, size = source.read_values(number)
    except InvalidMask as error:
        return _PairReport(reason=error.reason)
    except BadImage as error:
        return _PairReport(unreadable=str(error))
    if values.shape != size:
        height, width = values.shape
        return _PairReport(reason=f"is {width} x {height}, but its image is {size[1]} x {size[0]}")
    return _PairReport(frozenset(np.flatnonzero(np.bincount(values.ravel(), minlength=1)).tolist()))


def _infer_classes(splits: Splits, reports: list[list[_PairReport]]) -> MaskClasses:
    """Return the classes 0 to the largest value of any training mask."""
    ignored = cast("SegmentationSource", splits.train).mask_classes.ignored
    values_in_masks = {value for report in reports[0] for value in report.values}
    if values_in_masks and values_in_masks <= {0, 255} and 255 in values_in_masks and 255 in ignored:
        raise ConfigError(
            f"--data '{splits.train.name}': masks hold only 0 and 255, and 255 is ignored. If 255 marks the object, "
            "give --mask-values 0 255."
        )
    used = values_in_masks - set(ignored)
    largest = max(used, default=0)
    if largest < 1 or largest > 191 or len(used) < (largest + 1) / 2:
        raise DataError(
            f"--data '{splits.train.name}': masks hold {len(used)} values up to {largest}, which define no "
            "classes. Give --classes FILE with a name on each line, or --mask-values. Masks that were interpolated or "
            "saved as JPEG hold values that belong to no class: save them as PNG, without interpolation."
        )
    values = tuple(value for value in range(largest + 1) if value not in ignored)
    return MaskClasses(tuple(f"class {value}" for value in values), values, ignored)
