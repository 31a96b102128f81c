"""Reads every image of both splits, in several processes, and lists what would be learned wrongly.

The memory needed besides the source itself is 8 bytes per image, for comparing files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from torch.utils.data import BatchSampler, Dataset

from pecobook.data.dense.coco_check import compare_boxes
from pecobook.data.dense.detection import DetectionSource
from pecobook.data.dense.segmentation import SegmentationSource
from pecobook.data.dense.segmentation_classes import pixels_per_class
from pecobook.data.loading import Batches
from pecobook.data.source import ImageSource, Splits, kind_of
from pecobook.data.summary import Census, Lines, Look, class_counts, describe, left_out_of, look
from pecobook.engine.log import Progress
from pecobook.errors import DataError, first_line, listed, some_of
from pecobook.utils.devices import cores

Hashes: TypeAlias = npt.NDArray[np.uint64]
NUM_NAMES = 20  # files of a kind that are named
_COMPARED_BOXES = 50_000  # of each split at most, evenly spread
_FEW_IMAGES = 256  # up to this many are read in this process


@dataclasses.dataclass(frozen=True)
class Survey:
    """What was found in the images.

    Attributes:
        lines: (topic, text) lines, as for a training run but covering every image.
        problems: what a run would learn wrongly, as texts of one or more lines each.
        figures: all numbers, for programs.
    """

    lines: Lines
    problems: list[str]
    figures: dict[str, Any]


class _Looks(Dataset[Look]):
    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __getitem__(self, index: int) -> Look:
        return look(self.source, index, whole=True)


def survey(splits: Splits, *, labels: bool = True, workers: int = -1) -> Survey:
    """Inspect every image of a source.

    Args:
        splits: the opened source.
        labels: whether a run would learn from labels, if there are any; False ignores what is wrong with them.
        workers: number of processes; -1 uses one per core.
    """
    total = len(splits.train) + len(splits.evaluation)
    sources = (splits.train, splits.evaluation)
    censuses = [Census.of(source) for source in sources]
    digests: list[Hashes] = [np.zeros(len(source), np.uint64) for source in sources]
    done = 0
    try:
        with Progress(total=total, start=0, name="check", quiet=False) as progress:
            for source, census, hashes in zip(sources, censuses, digests, strict=True):
                for index, seen in enumerate(_looks(source, workers)):
                    census.add(seen, keep=NUM_NAMES)
                    hashes[index] = seen.digest or 0
                    progress.show(done := done + 1, {})
    except RuntimeError as error:  # a process that the system ended, for want of memory for example
        text = f"A process that reads images ended near image {done:,} of {total:,}: {first_line(error)}"
        raise DataError(f"{text.rstrip('.')}.\nGive --workers 1 to read in one process.") from error
    repeats, boxes = _Repeats(splits, *digests), _compare_boxes(splits)
    lines = describe(splits, censuses[0], evaluation=censuses[1])
    if labels:  # `_empty_classes` says what these notes say
        lines = [(topic, text) for topic, text in lines if kind_of(text) != "empty classes"]
    if censuses[0].values:
        lines.append(("values", _values_text(censuses[0])))
    if boxes.compared:
        lines.append(("boxes", f"{boxes.differing:,} of {boxes.compared:,} do not fit the masks of their objects"))
    lines.append(("duplicates", repeats.text()))
    problems = [*_unreadable(splits, censuses), *repeats.problems(), *_unknown_values(splits, censuses)]
    problems += [*boxes.problems(), *(_empty_classes(splits.train, censuses[0]) if labels else [])]
    lost = ("lost images", "lost labels") if labels else ("lost images",)
    problems += [note for note in splits.notes if kind_of(note) in lost]
    figures = _figures(splits, censuses, repeats)
    return Survey(lines, problems, figures | {"boxes_compared": boxes.compared, "boxes_differing": boxes.differing})


def _values_text(census: Census) -> str:
    """Return the values of the masks' pixels, or their number and range if there are many."""
    values = sorted(census.values)
    texts = (
        f"{len(values):,} values from {values[0]} to {values[-1]}"
        if len(values) > NUM_NAMES
        else some_of(values, NUM_NAMES)
    )
    return f"{texts} in the masks of training"


def _looks(source: ImageSource, workers: int) -> Iterator[Look]:
    number = len(cores()) if workers < 0 else workers
    looks = _Looks(source)
    if number < 2 or len(source) < _FEW_IMAGES:
        return (looks[index] for index in range(len(source)))
    batches = BatchSampler(range(len(source)), 16, drop_last=False)
    return (seen for batch in Batches(looks, batches, collate=list, workers=number) for seen in batch)


class _Repeats:
    """Files with identical bytes, within training and across both splits.

    Args:
        splits: the opened source.
        train: a hash of the file of each training image, uint64 (n,); 0 stands for a file that was not read.
        evaluation: the same for the held-out images.
    """

    def __init__(self, splits: Splits, train: Hashes, evaluation: Hashes) -> None:
        self.splits = splits
        known = train[train != 0]
        self.within = len(known) - len(np.unique(known))
        shared = np.intersect1d(known, evaluation[evaluation != 0])
        self.leaked = np.flatnonzero(np.isin(evaluation, shared))
        order = np.argsort(train, kind="stable")
        places = np.searchsorted(train[order], evaluation[self.leaked[:NUM_NAMES]])
        self.pairs = [
            (splits.evaluation.identify(held_out), splits.train.identify(int(order[place])))
            for held_out, place in zip(self.leaked[:NUM_NAMES].tolist(), places.tolist(), strict=True)
        ]

    def text(self) -> str:
        """Return both numbers as text."""
        return (
            f"in training {self.within:,}; held-out {self.splits.train.unit} that are in training {len(self.leaked):,}"
        )

    def problems(self) -> list[str]:
        """Return a text on held-out images that are in training, if there are any."""
        if not len(self.leaked):
            return []
        lines = [f"{held_out} is {training}" for held_out, training in self.pairs]
        count = f"{len(self.leaked):,} of {len(self.splits.evaluation):,}"
        unit = self.splits.train.unit
        head = f"Held-out {unit} with the bytes of a training {unit[:-1]}, so that scores would be too good: {count}"
        return [listed([head, *lines], None, further=len(self.leaked) - len(lines))]


@dataclasses.dataclass
class _Boxes:
    """How many objects were compared with their masks, how many of them differ, and the first images of these."""

    compared: int = 0
    differing: int = 0
    images: list[str] = dataclasses.field(default_factory=list)

    def problems(self) -> list[str]:
        """Return a text on boxes that do not fit their masks, if there are any."""
        head = f"{self.differing:,} of {self.compared:,} boxes do not fit the masks of their objects, in these images:"
        more = ["..."] if self.differing > len(self.images) == NUM_NAMES else []
        return ["\n".join([head, *self.images, *more])] if self.differing else []


def _compare_boxes(splits: Splits) -> _Boxes:
    """Compare the boxes with the masks of the same objects, if there are both."""
    found = _Boxes()
    sources = [part for part in (splits.train, splits.evaluation) if isinstance(part, DetectionSource)]
    for file in {id(source.annotations): source.annotations for source in sources}.values():
        comparison = compare_boxes(file, _COMPARED_BOXES)
        found.compared += comparison.compared
        found.differing += len(comparison.differing)
        rows = np.searchsorted(file.starts, np.array(comparison.differing, np.int64), side="right") - 1
        found.images += [file.identify(row) for row in dict.fromkeys(rows.tolist())]
    found.images = found.images[:NUM_NAMES]
    return found


def _unreadable(splits: Splits, censuses: list[Census]) -> list[str]:
    problems = []
    for source, census in zip((splits.train, splits.evaluation), censuses, strict=True):
        for bad in source.unreadable if isinstance(source, SegmentationSource) else ():
            census.add(Look(bad.name, problem=bad), keep=NUM_NAMES)
        if census.num_bad:
            kind = "Training" if source.split == "train" else "Held-out"
            lines = []
            for reason, names in census.bad.items():  # a reason that many images have is written once
                lines += [f"{names[0]}: {reason}"] if len(names) == 1 else [f"{reason}:", *(f"  {n}" for n in names)]
            what = f"{source.unit} or masks" if isinstance(source, SegmentationSource) else source.unit
            head = f"{kind} {what} that cannot be read"
            rest = census.num_bad - len(census.names_of_bad())
            problems.append(listed([f"{head}: {census.num_bad:,}", *lines], None, further=rest))
    return problems


def _unknown_values(splits: Splits, censuses: list[Census]) -> list[str]:
    """Return a line on each of the first values of masks that are neither a class nor ignored."""
    problems = []
    for source, census in zip((splits.train, splits.evaluation), censuses, strict=True):
        if not isinstance(source, SegmentationSource):
            continue
        unknown = sorted(census.values.keys() - {*source.mask_classes.values, *source.mask_classes.ignored})
        kind = "training" if source.split == "train" else "held-out"
        if unknown:
            named = some_of((f"{value} in {census.masks_with[value]:,}" for value in unknown), NUM_NAMES)
            share = sum(census.values[value] for value in unknown) / census.values.total()
            problems.append(
                f"{100 * share:.2g}% of the pixels of {kind} masks have values of no class ({named} of "
                f"{census.masks:,} masks): name them in --classes or --mask-values, or add them to --ignore."
            )
    return problems


def _empty_classes(train: ImageSource, census: Census) -> list[str]:
    """Return a line on classes that training would not see."""
    kind, counts = "objects" if isinstance(train, DetectionSource) else train.unit, class_counts(train) or {}
    if isinstance(train, SegmentationSource):
        kind, counts = "pixels", pixels_per_class(train.mask_classes, census.values)
    empty = [name for name, count in counts.items() if count == 0]
    problems = []
    if empty:
        problems.append(
            f"{len(empty):,} of {len(counts):,} classes have no {kind} in training: {', '.join(empty[:NUM_NAMES])}"
        )
    if len(counts) == 1 and kind == train.unit:
        problems.append(f"All {kind} are of one class, '{next(iter(counts))}', so there is nothing to tell apart.")
    return problems


def _figures(splits: Splits, censuses: list[Census], repeats: _Repeats) -> dict[str, Any]:
    return {
        "train": _figures_of(splits.train, censuses[0]),
        "evaluation": _figures_of(splits.evaluation, censuses[1]) | {"name": splits.evaluation_name},
        "left_out": dict(left_out_of(splits)),
        "repeated_in_train": repeats.within,
        "held_out_in_train": len(repeats.leaked),
        "notes": list(splits.notes),
    }


def _figures_of(source: ImageSource, census: Census) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "images": len(source),
        "unreadable": census.num_bad,
        "modes": dict(census.modes),
        "short_side": [sides[0] for sides in (census.smallest, census.largest) if sides],
        "long_side": [sides[1] for sides in (census.smallest, census.largest) if sides],
    }
    if (counts := class_counts(source)) is not None:
        figures["objects" if isinstance(source, DetectionSource) else "classes"] = counts
    if isinstance(source, SegmentationSource):
        figures["pixels"] = pixels_per_class(source.mask_classes, census.values)
        figures["mask_values"] = {str(value): count for value, count in sorted(census.values.items())}
    return figures
