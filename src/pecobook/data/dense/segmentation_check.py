"""A look at every pair of image and mask before training, so that what is wrong is known before hours are spent."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import cast

import numpy as np

from pecobook.data.decode import BadImage
from pecobook.data.dense.segmentation import SegmentationSource
from pecobook.data.dense.segmentation_classes import Classes, WrongMask
from pecobook.data.source import Splits
from pecobook.errors import ConfigError, DataError
from pecobook.utils.devices import cores


@dataclasses.dataclass(frozen=True)
class Verified:
    """What a look at every pair found.

    Attributes:
        splits: the source, its classes known, without what is wrong.
        problems: what is wrong, a line for each pair.
        unreadable: images and masks that cannot be read, a line for each.
    """

    splits: Splits
    problems: tuple[str, ...]
    unreadable: tuple[str, ...]


def verify(splits: Splits, show: Callable[[int], None] = lambda _done: None) -> Verified:
    """Read every mask and the header of its image once, on all cores: sizes that differ, values without a class, what
    cannot be read.

    Args:
        splits: of `open_segmentation`.
        show: called with how many pairs are done.
    """
    from concurrent.futures import ThreadPoolExecutor

    sources = [cast("SegmentationSource", part) for part in (splits.train, splits.evaluation)]
    reports: list[list[_PairReport]] = []
    done = 0
    with ThreadPoolExecutor(max_workers=len(cores())) as pool:
        for source in sources:
            pairs = []
            for pair in pool.map(partial(_check_pair, source), range(len(source))):
                pairs.append(pair)
                show(done := done + 1)
            reports.append(pairs)
    meaning = sources[0].meaning
    if not meaning.names:
        meaning = _infer(splits, reports)
    known = {*meaning.values, *meaning.ignored}
    problems, unreadable = [], []
    good: list[SegmentationSource] = []
    for source, pairs in zip(sources, reports, strict=True):
        wrong = {number: reason for number, pair in enumerate(pairs) if (reason := pair.problem(known, meaning))}
        problems += [f"{source.mask_name(number)} {reason}" for number, reason in wrong.items()]
        unreadable += [pair.unreadable for pair in pairs if pair.unreadable]
        good += [source.subset(n for n, pair in enumerate(pairs) if n not in wrong and not pair.unreadable)]
    train, held_out = (source.with_classes(meaning) for source in good)
    return Verified(Splits(train, held_out, splits.evaluation_name), tuple(problems), tuple(unreadable))


@dataclasses.dataclass(frozen=True)
class _PairReport:
    """What one mask holds."""

    values: frozenset[int] = frozenset()
    reason: str = ""
    unreadable: str = ""

    def problem(self, known: set[int], meaning: Classes) -> str:
        strange = sorted(self.values - known)
        if self.reason or not strange:
            return self.reason
        if meaning.colours is not None:
            return "has colours that --classes does not name"
        last = max(meaning.values, default=0)
        return (
            f"holds the value {strange[0]}, and the {len(meaning.names)} classes have {min(meaning.values)} to {last}"
        )


def _check_pair(source: SegmentationSource, number: int) -> _PairReport:
    try:
        values, size = source.values_of(number)
    except WrongMask as error:
        return _PairReport(reason=error.reason)
    except BadImage as error:
        return _PairReport(unreadable=str(error))
    if values.shape != size:
        height, width = values.shape
        return _PairReport(reason=f"is {width} x {height}, and its image {size[1]} x {size[0]}")
    return _PairReport(frozenset(np.flatnonzero(np.bincount(values.ravel(), minlength=1)).tolist()))


def _infer(splits: Splits, reports: list[list[_PairReport]]) -> Classes:
    """Classes 0 to the largest value of any training mask."""
    ignored = cast("SegmentationSource", splits.train).meaning.ignored
    seen = {value for pair in reports[0] for value in pair.values}
    if seen and seen <= {0, 255} and 255 in seen and 255 in ignored:
        raise ConfigError(
            f"--data '{splits.train.name}': masks hold 0 and 255 alone, and 255 is ignored. If 255 marks the object, "
            "give --mask-values 0 255."
        )
    used = seen - set(ignored)
    largest = max(used, default=0)
    if largest < 1 or largest > 191 or len(used) < (largest + 1) / 2:
        raise DataError(
            f"--data '{splits.train.name}': masks hold {len(used)} values up to {largest}, which tells no classes. "
            "Give --classes FILE with a name on each line, or --mask-values. Masks that were smoothed or saved as JPEG "
            "hold values of no class: save them as PNG, without interpolation."
        )
    values = tuple(value for value in range(largest + 1) if value not in ignored)
    return Classes(tuple(f"class {value}" for value in values), values, ignored)
