"""The classes that make up every image source: `Store`, `Part`, `ImageSource` and `Splits`.

A `Store` reads images by row, a `Part` is the rows of one declared split, and `Splits` holds the training and the
evaluation source. The module of each form of source (folders.py, tables.py, shards.py) makes parts, and `assemble`
turns parts into `Splits`.
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

from pecobook.data.decode import Range
from pecobook.data.deep import FULL_16_BITS, ValueRange
from pecobook.errors import DataError, did_you_mean

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "gif", "tif", "tiff", "webp", "ppm", "pgm")

Integers = npt.NDArray[np.int64]


class Store(Protocol):
    """Rows of images that can be read in any order.

    A store can be pickled and forked: each process opens a file when it first reads from it.

    Attributes:
        value_range: the values that become black and white in images with more than 8 bits; see `decode`.
    """

    value_range: Range | None

    def __len__(self) -> int: ...

    def read(self, row: int) -> Tensor:
        """Read and decode the image of a row: uint8 (3, H, W). Raises BadImage."""

    def identify(self, row: int) -> str:
        """Return a name by which a person can find the image."""

    def digest(self, rows: Integers) -> str:
        """Return a hash that identifies the rows; it is equal on another machine with the same files."""


class ImageSource:
    """The images of one split in a fixed order, each read on demand.

    An image source can be pickled and forked, so it can be passed to DataLoader workers.

    Attributes:
        name: the source as the user wrote it.
        split: "train" or "evaluation".
        classes: names of the classes, or None if there are no labels.
        labels: int64 (n,), the index in `classes` for each image, or None.
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
        self._rows = rows  # int64 (n,): image number -> row of the store; None stands for all rows in order

    def __len__(self) -> int:
        return len(self._store) if self._rows is None else len(self._rows)

    def read(self, index: int) -> Tensor:
        """Read and decode image `index`: uint8 (3, H, W), RGB. Raises BadImage if the image cannot be read."""
        return self._store.read(self._row(index))

    def sample(self, index: int) -> tuple[Any, ...]:
        """Read the inputs of a view: (image,), or (image, mask or boxes) in dense sources. Raises BadImage."""
        return (self.read(index),)

    def identify(self, index: int) -> str:
        """Return a name by which a person can find image `index`: a path, "x.parquet row 12", "x.tar/member"."""
        return self._store.identify(self._row(index))

    def subset(self, indices: Iterable[int] | Integers) -> ImageSource:
        """Return a source with only the given images, in the given order."""
        chosen = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices), dtype=np.int64)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(f"a subset of {len(self)} images has the indices {chosen.min()} to {chosen.max()}")
        return ImageSource(
            self._store,
            name=self.name,
            split=self.split,
            rows=chosen if self._rows is None else self._rows[chosen],
            classes=self.classes,
            labels=None if self.labels is None else self.labels[chosen],
        )

    @property
    def value_range(self) -> ValueRange | None:
        """The values that become black and white in images with more than 8 bits; None if no range was set."""
        value_range = getattr(self._store, "value_range", None)  # a store of few lines may leave it out
        return value_range if isinstance(value_range, ValueRange) else None

    def use_range(self, value_range: Range | None) -> None:
        """Decode images with more than 8 bits with this range, in all sources that share the store too."""
        self._store.value_range = value_range

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when the images change.

        The fingerprint is a hash of names (and of sizes if reading them takes no time), not of pixels. It does not
        depend on the location of the folder. A range of values that was set changes the fingerprint.
        """
        rows = np.arange(len(self), dtype=np.int64) if self._rows is None else self._rows
        identity = f"{len(self)} {self._store.digest(rows)}"
        if self.value_range not in (None, FULL_16_BITS):  # both give the same pixels
            identity += f" {self.value_range}"
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)} in '{self.name}'")
        return int(index if self._rows is None else self._rows[index])

    def __repr__(self) -> str:
        return f"ImageSource({self.name!r}, {self.split}, {len(self)} images, {len(self.classes or ())} classes)"


@dataclass(frozen=True)
class Splits:
    """The training and the evaluation split of an opened source.

    Attributes:
        train: the training images.
        evaluation: held-out images; `train` contains none of them.
        evaluation_name: the kind of `evaluation`: "test", "validation", "held-out 10% of train" or "held-out regions".
    """

    train: ImageSource
    evaluation: ImageSource
    evaluation_name: str


# ---- splits and labels of all forms of source ----


@dataclass(frozen=True)
class Labels:
    """A column of labels: `codes` int64 (n,) are indices in `names`; -1 marks an image without a label."""

    codes: Integers
    names: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """One declared split: rows of a store, and the labels of these rows or None."""

    store: Store
    rows: Integers
    labels: Labels | None


def split_from_name(name: str) -> str | None:
    """Return the split that a relative path or the name of a split declares: "train", "validation", "test" or None.

    A name declares a split if it begins with train, val or test, or contains one of them as a word:
    "train-00000-of-00002.parquet", "imagenet-val-003.tar", "test/0000.tar". The name of the file takes precedence over
    the names of its folders.
    """
    word = re.compile(r"(?:^|[^a-z])(train|val|test)(?:ing|idation|id|set|s)?(?![a-z])")
    for part in reversed(name.lower().replace("\\", "/").split("/")):
        match = re.match(r"(train|val|test)", part) or word.search(part)
        if match:
            return {"train": "train", "val": "validation", "test": "test"}[match[1]]
    return None


def relative_names(files: list[Path], root: Path | None) -> list[str]:
    """Return the paths relative to `root`, or to the deepest common folder if `root` is None."""
    common = root or Path(os.path.commonpath([file.parent for file in files]))
    return [str(file.relative_to(common)) for file in files]


def group_by_split(names: Iterable[str]) -> dict[str, list[int]]:
    """Group the indices of files (or of a data set's splits) into "train", "validation" and "test" by name.

    If no name declares "train", the files that declare no split are the training set. If there is still no training
    file, the declared splits are ignored and all files are "train".
    """
    groups: dict[str | None, list[int]] = {}
    count = 0
    for number, name in enumerate(names):
        groups.setdefault(split_from_name(name), []).append(number)
        count += 1
    undeclared = groups.pop(None, [])
    declared = {split: numbers for split, numbers in groups.items() if split is not None}
    if "train" not in declared and undeclared:
        declared["train"] = undeclared
    return declared if "train" in declared else {"train": list(range(count))}


def assemble(source: str, parts: Mapping[str, Part]) -> Splits:
    """Make `Splits` from the part "train" and, if declared, the parts "test" and "validation".

    Raises:
        DataError: there is no training image, or a class of the evaluation split is missing in training.
    """
    train = parts["train"]
    if len(train.rows) == 0:
        raise DataError(f"--data '{source}': the training split holds no image.")
    is_labelled = train.labels is not None and train.labels.codes.min() >= 0
    classes, labels = (train.labels.names, train.labels.codes) if train.labels and is_labelled else (None, None)
    training = ImageSource(train.store, name=source, split="train", rows=train.rows, classes=classes, labels=labels)

    candidates = [name for name in ("test", "validation") if name in parts and len(parts[name].rows)]
    if not candidates:
        return hold_out(training)
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
    return Splits(training, evaluation, chosen)


def _is_labelled(part: Part) -> bool:
    return part.labels is not None and bool(part.labels.codes.min() >= 0)


def _renumber(source: str, split: str, labels: Labels | None, classes: tuple[str, ...]) -> Integers | None:
    """Convert the labels of the evaluation split to indices in the training classes."""
    if labels is None:
        return None
    code_of = {name: code for code, name in enumerate(classes)}
    missing = [labels.names[code] for code in np.unique(labels.codes) if labels.names[code] not in code_of]
    if missing:
        raise DataError(
            f"--data '{source}': class '{missing[0]}' of {split} is missing in train"
            f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}."
            f"{did_you_mean(missing[0], classes)}\n"
            f"Every class of {split} must exist in train: add the class to train or remove it from {split}."
        )
    table = np.array([code_of.get(name, -1) for name in labels.names], dtype=np.int64)
    return np.asarray(table[labels.codes])


def hold_out(source: ImageSource) -> Splits:
    """Hold out 10% of the images (at least one) for evaluation; the choice is always the same.

    The held-out images are those whose indices have the smallest splitmix64 hash. This arithmetic does not depend on
    the version of any library.
    """
    count = len(source)
    if count < 2:
        raise DataError(f"--data '{source.name}' holds one image; at least two are needed, one for evaluation.")
    hashes = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    hashes ^= hashes >> np.uint64(31)
    is_held_out = np.zeros(count, dtype=bool)
    is_held_out[np.argsort(hashes, kind="stable")[: max(1, count // 10)]] = True
    evaluation = source.subset(np.flatnonzero(is_held_out))
    evaluation.split = "evaluation"
    return Splits(source.subset(np.flatnonzero(~is_held_out)), evaluation, "held-out 10% of train")
