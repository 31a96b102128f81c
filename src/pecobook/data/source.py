"""What every image source is made of: rows of images in a `Store`, the `Part` of them that a split is, and `Splits`.

Each form of source (folders.py, tables.py, shards.py) makes parts; `assemble` makes the same `Splits` of all of them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pecobook.errors import DataError, did_you_mean

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "gif", "tif", "tiff", "webp", "ppm", "pgm")

Integers = npt.NDArray[np.int64]


class Store(Protocol):
    """Rows of images, read at random.

    It can be pickled and forked: files are opened when they are first read, in each process.
    """

    def __len__(self) -> int: ...

    def read(self, row: int) -> Tensor:
        """The image, uint8 (3, H, W); raises BadImage."""

    def identify(self, row: int) -> str:
        """A name by which a person finds the image."""

    def digest(self, rows: Integers) -> str:
        """A hash of what identifies these rows; equal on another machine with the same files."""


class ImageSource:
    """The images of one split, read lazily and at random, in a fixed order.

    It can be pickled and forked, so it goes to DataLoader workers as it is.

    Attributes:
        name: the source as its user wrote it.
        split: "train" or "evaluation".
        classes: names of the classes, or None when there are no labels.
        labels: int64 (n,), the number in `classes` of each image, or None.
    """

    name: str
    split: str
    classes: tuple[str, ...] | None
    labels: Integers | None

    def __init__(
        self,
        store: Store,
        *,
        name: str,
        split: str,
        rows: Integers | None = None,
        classes: tuple[str, ...] | None = None,
        labels: Integers | None = None,
    ) -> None:
        self.name, self.split, self.classes, self.labels = name, split, classes, labels
        self._store = store
        self._rows = rows  # int64 (n,): image number -> row of the store; None is all rows, in order

    def __len__(self) -> int:
        return len(self._store) if self._rows is None else len(self._rows)

    def read(self, index: int) -> Tensor:
        """Read and decode image `index`: uint8 (3, H, W), RGB. Raises BadImage when it cannot be."""
        return self._store.read(self._row(index))

    def sample(self, index: int) -> tuple[Any, ...]:
        """What a view is made of: the image alone; a source with masks or boxes gives these too. Raises BadImage."""
        return (self.read(index),)

    def identify(self, index: int) -> str:
        """A name by which a person finds image `index`: a path, "x.parquet row 12", "x.tar/member"."""
        return self._store.identify(self._row(index))

    def subset(self, indices: Iterable[int] | Integers) -> ImageSource:
        """The same source with only these images, in this order."""
        chosen = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices), dtype=np.int64)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(f"a subset of {len(self)} images asks for numbers {chosen.min()} to {chosen.max()}")
        return ImageSource(
            self._store,
            name=self.name,
            split=self.split,
            rows=chosen if self._rows is None else self._rows[chosen],
            classes=self.classes,
            labels=None if self.labels is None else self.labels[chosen],
        )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when the images do.

        Made of names (and of sizes where they cost nothing), not of pixels. The place of a folder does not
        count.
        """
        rows = np.arange(len(self), dtype=np.int64) if self._rows is None else self._rows
        return hashlib.sha256(f"{len(self)} {self._store.digest(rows)}".encode()).hexdigest()[:16]

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)} in '{self.name}'")
        return int(index if self._rows is None else self._rows[index])

    def __repr__(self) -> str:
        return f"ImageSource({self.name!r}, {self.split}, {len(self)} images, {len(self.classes or ())} classes)"


@dataclass(frozen=True)
class Splits:
    """A source, opened.

    Attributes:
        train: the images to learn from.
        evaluation: held-out images, none of them in `train`.
        evaluation_name: what they are: "test", "validation", "held-out 10% of train" or "held-out regions".
    """

    train: ImageSource
    evaluation: ImageSource
    evaluation_name: str


# ---- splits and labels, the same for all forms ----


@dataclass(frozen=True)
class Labels:
    """A column of labels: `codes` int64 (n,) are numbers in `names`; -1 marks an image without a label."""

    codes: Integers
    names: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """One declared split: some rows of a store and their labels, None when there are none."""

    store: Store
    rows: Integers
    labels: Labels | None


def split_of(name: str) -> str | None:
    """The split that a relative path or a split's name declares: "train", "validation", "test" or None.

    The file's own name decides before its folders do. It begins with train, val or test, or has one of them
    as a word: "train-00000-of-00002.parquet", "imagenet-val-003.tar", "test/0000.tar".
    """
    word = re.compile(r"(?:^|[^a-z])(train|val|test)(?:ing|idation|id|set|s)?(?![a-z])")
    for part in reversed(name.lower().replace("\\", "/").split("/")):
        found = re.match(r"(train|val|test)", part) or word.search(part)
        if found:
            return {"train": "train", "val": "validation", "test": "test"}[found[1]]
    return None


def names_under(files: list[Path], root: Path | None) -> list[str]:
    """Paths relative to `root`, or to the folder that all of them have in common."""
    common = root or Path(os.path.commonpath([file.parent for file in files]))
    return [str(file.relative_to(common)) for file in files]


def group_by_split(names: Iterable[str]) -> dict[str, list[int]]:
    """Sort files (or a data set's splits) into "train", "validation" and "test" by their names.

    Files that declare no split are the training set when none declares itself to be; without any training
    file, no split is declared, and all files are "train".
    """
    groups: dict[str | None, list[int]] = {}
    count = 0
    for number, name in enumerate(names):
        groups.setdefault(split_of(name), []).append(number)
        count += 1
    unmarked = groups.pop(None, [])
    declared = {split: numbers for split, numbers in groups.items() if split is not None}
    if "train" not in declared and unmarked:
        declared["train"] = unmarked
    return declared if "train" in declared else {"train": list(range(count))}


def assemble(source: str, parts: Mapping[str, Part]) -> Splits:
    """Make `Splits` of the parts "train" and, where declared, "test" and "validation".

    Raises:
        DataError: there is no training image, or a class of the evaluation split is missing in training.
    """
    train = parts["train"]
    if len(train.rows) == 0:
        raise DataError(f"--data '{source}': the training split holds no image.")
    known = train.labels is not None and train.labels.codes.min() >= 0
    classes, labels = (train.labels.names, train.labels.codes) if train.labels and known else (None, None)
    whole = ImageSource(train.store, name=source, split="train", rows=train.rows, classes=classes, labels=labels)

    candidates = [name for name in ("test", "validation") if name in parts and len(parts[name].rows)]
    if not candidates:
        return hold_out(whole)
    labelled = [name for name in candidates if _is_labelled(parts[name])]
    chosen = labelled[0] if classes is not None and labelled else candidates[0]
    part = parts[chosen]
    evaluation = ImageSource(
        part.store,
        name=source,
        split="evaluation",
        rows=part.rows,
        classes=classes,
        labels=_renumber(source, chosen, part.labels, classes) if classes and _is_labelled(part) else None,
    )
    return Splits(whole, evaluation, chosen)


def _is_labelled(part: Part) -> bool:
    return part.labels is not None and bool(part.labels.codes.min() >= 0)


def _renumber(source: str, split: str, labels: Labels | None, classes: tuple[str, ...]) -> Integers | None:
    """Labels of the evaluation split as numbers in the training classes."""
    if labels is None:
        return None
    number = {name: code for code, name in enumerate(classes)}
    missing = [labels.names[code] for code in np.unique(labels.codes) if labels.names[code] not in number]
    if missing:
        raise DataError(
            f"--data '{source}': class '{missing[0]}' of {split} is missing in train"
            f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}."
            f"{did_you_mean(missing[0], classes)}\n"
            "Both splits need the same classes; add it to train or take it away."
        )
    table = np.array([number.get(name, -1) for name in labels.names], dtype=np.int64)
    return np.asarray(table[labels.codes])


def hold_out(whole: ImageSource) -> Splits:
    """Take 10% of the images (at least one) out of training, always the same ones.

    The choice is the images whose numbers have the least splitmix64 hash: arithmetic that no library version
    changes.
    """
    count = len(whole)
    if count < 2:
        raise DataError(f"--data '{whole.name}' holds one image; at least two are needed, one to evaluate on.")
    mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    held = np.zeros(count, dtype=bool)
    held[np.argsort(mixed, kind="stable")[: max(1, count // 10)]] = True
    evaluation = whole.subset(np.flatnonzero(held))
    evaluation.split = "evaluation"
    return Splits(whole.subset(np.flatnonzero(~held)), evaluation, "held-out 10% of train")
