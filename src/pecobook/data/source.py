"""The classes that make up every image source: `Store`, `ImageSource` and `Splits`.

A `Store` reads images by row, an `ImageSource` is the images of one split, and `Splits` holds the training and the
evaluation source.
"""

from __future__ import annotations

import copy
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pecobook.data.decode import BadImage, Range, decode, read_file
from pecobook.data.deep import FULL_16_BITS, ValueRange
from pecobook.data.mapped import mapped
from pecobook.data.remote import RemotePath, is_remote
from pecobook.data.sampler import splitmix64_array
from pecobook.errors import DataError

Integers = npt.NDArray[np.int64]
_HASHED_IMAGES = 32
_PART = 2**20
"""Number of image indices hashed at a time."""


class Store:
    """Rows of images that can be read in any order.

    A store can be pickled and forked: each process opens a file when it first reads from it. Each store overrides
    `__len__`, `identify`, `file` and `digest`, and whatever else differs.

    Attributes:
        value_range: the values mapped to black and white in images with more than 8 bits; see `decode`.
    """

    value_range: Range | None = None
    unit = "images"
    """What the rows are, for messages."""

    def __len__(self) -> int:
        raise NotImplementedError

    def identify(self, row: int) -> str:
        """Return a human-readable name of the image."""
        raise NotImplementedError

    def file(self, row: int) -> Path | bytes | None:  # noqa: ARG002
        """Return the path of a row's file, its bytes if it lies inside another file, or None if it is not a file."""
        return None

    def encoded(self, row: int) -> bytes:
        """Return the bytes of the image file of a row. Raises BadImage."""
        file = self.file(row)
        return file if isinstance(file, bytes) else read_file(cast("Path", file), self.identify(row))

    def content(self, row: int) -> bytes:
        """Return the bytes of the image file of a row, and of its mask. Raises BadImage."""
        return self.encoded(row)

    def read(self, row: int, shortest: int = 0) -> Tensor:
        """Read and decode the image of a row: uint8 (3, H, W); `shortest` is that of `decode`. Raises BadImage."""
        data = self.encoded(row)
        try:
            return decode(data, value_range=self.value_range, shortest=shortest)
        except BadImage as error:  # getting the name takes time, and only this case needs it
            raise BadImage(self.identify(row), error.reason) from error.__cause__

    def sample(self, row: int, shortest: int = 0) -> tuple[Any, ...]:
        """Return what `ImageSource.sample` returns. Raises BadImage."""
        return (self.read(row, shortest),)

    def files(self, rows: Integers) -> Iterable[bytes] | None:  # noqa: ARG002
        """Return the paths of the files that contain the rows, possibly with repeats; None if they are in no files."""
        return None

    def num_bytes(self) -> int:
        """Return the bytes of all encoded images of a table; 0 for other stores."""
        return 0

    def digest(self, rows: Integers) -> str:
        """Return a hash that identifies the rows; it is the same on another machine with the same files."""
        raise NotImplementedError


class ImageSource:
    """The images of one split in a fixed order, each read on demand.

    An image source can be pickled and forked, so it can be passed to DataLoader workers.

    Attributes:
        name: the source as the user wrote it.
        split: "train" or "evaluation".
        classes: names of the classes, or None if there are no labels.
        labels: int64 (n,), the index in `classes` for each image, or None.
        unlabelled: why there are no labels, if there is more to say; this includes the names of images.
        left_out: reason -> number of images, masks or objects of a dense source that training and scores do not use.
    """

    name: str
    split: str
    classes: tuple[str, ...] | None
    labels: Integers | None
    unlabelled: str = ""

    def __init__(
        self,
        store: Store,
        *,
        name: str,
        split: str,
        rows: Integers | None = None,
        classes: tuple[str, ...] | None = None,
        labels: Integers | None = None,
        left_out: Mapping[str, int] | None = None,
    ) -> None:
        self.left_out = dict(left_out or {})
        self.name, self.split, self.classes, self.labels = name, split, classes, labels
        self._store = store
        # Integers (n,): image number -> row of the store; None stands for all rows in order.
        self._rows = None if rows is None else _compact(rows, len(store))

    def __len__(self) -> int:
        return len(self._store) if self._rows is None else len(self._rows)

    def read(self, index: int, shortest: int = 0) -> Tensor:
        """Read and decode image `index`: uint8 (3, H, W), RGB.

        Args:
            index: number of the image.
            shortest: above 0, a large JPEG may be reduced if its shorter side keeps this many pixels; see `decode`.

        Raises:
            BadImage: the image cannot be read.
        """
        return self._store.read(self._row(index), shortest)

    def file(self, index: int) -> Path | bytes | None:
        """Return the path of image `index`'s file, or its bytes if it lies inside another file.

        None means that the image is not a file. Raises BadImage.
        """
        return self._store.file(self._row(index))

    def sample(self, index: int, shortest: int = 0) -> tuple[Any, ...]:
        """Read the inputs of a view: (image,), (image, mask or objects) in dense sources, or (a reader of frames,).

        `shortest` is that of `read`.

        Raises BadImage.
        """
        return self._store.sample(self._row(index), shortest)

    def identify(self, index: int) -> str:
        """Return a human-readable name of image `index`: a path, "x.parquet row 12", "x.tar/member"."""
        return self._store.identify(self._row(index))

    def subset(self, indices: Iterable[int] | Integers) -> Self:
        """Return a source with only the given images, in the given order."""
        chosen = indices if isinstance(indices, np.ndarray) else np.asarray(list(indices), dtype=np.int64)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(f"a subset of {len(self)} images has the indices {chosen.min()} to {chosen.max()}")
        part = copy.copy(self)
        part._rows = _compact(chosen, len(self._store)) if self._rows is None else self._rows[chosen]
        part.labels = None if self.labels is None else self.labels[chosen]
        return part

    def map(self) -> Self:
        """Move the row numbers and labels of a large source into memory-mapped files, and return the source."""
        self._rows = None if self._rows is None else mapped(self._rows)
        self.labels = None if self.labels is None else mapped(self.labels)
        return self

    @property
    def unit(self) -> str:
        """What the source contains, "images" or "clips"."""
        return self._store.unit

    @property
    def value_range(self) -> ValueRange | None:
        """The values mapped to black and white in images with more than 8 bits; None if no range was set."""
        value_range = self._store.value_range
        return value_range if isinstance(value_range, ValueRange) else None

    def use_range(self, value_range: Range | None) -> None:
        """Decode images with more than 8 bits with this range, in all sources that share the store."""
        self._store.value_range = value_range

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when the images change.

        The fingerprint is a hash of names and, in parquet files and shards, of sizes and of the bytes of a few images,
        so that a file rewritten with other images has another one. The fingerprint of a folder of images covers only
        the names; record.py sees more. It does not depend on the location of the folder. Setting a value range changes
        the fingerprint.
        """
        identity = f"{len(self)} {self.digest()}"
        if self.value_range not in (None, FULL_16_BITS):  # both give the same pixels
            identity += f" {self.value_range}"
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    def digest(self) -> str:
        """Return a hash that identifies the images, whatever their value range."""
        return self._store.digest(self.rows)

    def files(self) -> Iterable[bytes] | None:
        """Return the paths of the images' files, possibly with repeats; None if they are in no files."""
        return None if self.name.startswith("hf:") or is_remote(self.name) else self._store.files(self.rows)

    def content(self, index: int) -> bytes:
        """Read the bytes of image `index`, and of its mask, before they are decoded. Raises BadImage."""
        return self._store.content(self._row(index))

    @property
    def num_bytes(self) -> int:
        """The bytes of all encoded images of the table that contains the images; 0 for other sources."""
        return self._store.num_bytes()

    @property
    def rows(self) -> Integers:
        """The store's row for each image, int64 (n,)."""
        return np.arange(len(self._store), dtype=np.int64) if self._rows is None else self._rows.astype(np.int64)

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)} in '{self.name}'")
        return int(index if self._rows is None else self._rows[index])

    def __repr__(self) -> str:
        return f"ImageSource({self.name!r}, {self.split}, {len(self)} images, {len(self.classes or ())} classes)"


class Note(str):
    """A sentence on a source, with its topic; a plain sentence is about nothing that `pecobook check` reports.

    Attributes:
        kind: "lost labels" or "lost images", which would be learned wrongly; "one class"; or "empty classes".
    """

    kind: str

    def __new__(cls, text: str, kind: str = "") -> Self:
        """Return a note."""
        note = super().__new__(cls, text)
        note.kind = kind
        return note


def kind_of(note: str) -> str:
    """Return the kind of a note, or an empty string for a plain sentence."""
    return note.kind if isinstance(note, Note) else ""


@dataclass(frozen=True)
class Splits:
    """The training and the evaluation split of an opened source.

    Attributes:
        train: the training images.
        evaluation: held-out images; `train` contains none of them.
        evaluation_name: the kind of `evaluation`: "test", "validation", "held-out 10% of train" or "held-out regions".
        left_out: why files (or samples) of the source are not used, in a few words such as "extension .xyz", and the
            number of each kind.
        notes: sentences that a run prints once before it starts, such as why the source has no labels; see `Note`.
        files: the annotation files and the files of class names.
    """

    train: ImageSource
    evaluation: ImageSource
    evaluation_name: str
    left_out: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


# ---- splits and labels of all forms of source ----


def hash_some(read: Callable[[int], bytes], rows: Integers) -> hashlib._Hash:
    """Return a hash over the bytes of a few rows, which `read` reads; names can be added to it."""
    digest = hashlib.sha256()
    for row in rows[:: max(len(rows) // _HASHED_IMAGES, 1)][:_HASHED_IMAGES].tolist():
        try:
            digest.update(read(row))
        except BadImage:
            digest.update(b"unreadable")
    return digest


def arrow_binary(values: list[bytes]) -> Any:
    """Return an Arrow array of texts, which may exceed 2 GiB in total; see `arrow_integers`."""
    import pyarrow as pa

    ends = np.zeros(len(values) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, values), np.int64, len(values)), out=ends[1:])
    return pa.Array.from_buffers(
        pa.large_binary(), len(values), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(values))]
    )


def arrow_integers(values: Integers) -> Any:
    """Return an Arrow array of the integers.

    pyarrow's own conversion would import pandas, which takes half a second of CPU time at every start.
    """
    import pyarrow as pa

    return pa.Array.from_buffers(
        pa.int64(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values, dtype=np.int64))]
    )


def release_memory() -> None:
    """Return memory that Arrow has freed to the system; Arrow would keep twice the size of a large source's columns."""
    if "pyarrow" in sys.modules:
        sys.modules["pyarrow"].default_memory_pool().release_unused()


def file_version(file: Path) -> str:
    """Return text that changes if a file is replaced or written, even if its modification time is then reset.

    The change time of the entry (ctime) cannot be set, and a replacement file has its own inode.
    """
    if isinstance(file, RemotePath):
        return file.version()
    status = file.stat()
    numbers = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return f"{os.fsencode(file.resolve()).decode(errors='replace')} {numbers}"


def relative_names(files: list[Path], root: Path | None) -> list[str]:
    """Return the paths relative to `root`, or to the deepest common folder if `root` is None."""
    common = root or Path(os.path.commonpath([file.parent for file in files]))
    return [str(file.relative_to(common)) for file in files]


def unused_splits(counts: Mapping[str, int], chosen: str) -> dict[str, int]:
    """Return the entries of `Splits.left_out` for splits that are neither "train" nor the evaluation split `chosen`."""
    return {
        f"in the {split} split, because {chosen} is held out": count
        for split, count in counts.items()
        if split not in ("train", chosen) and count
    }


def hold_out(source: ImageSource) -> Splits:
    """Hold out 10% of the images (at least one) for evaluation; the choice is always the same.

    The held-out images are those whose indices have the smallest splitmix64 hash. This arithmetic does not depend on
    the version of any library.
    """
    count = len(source)
    if count < 2:
        raise DataError(
            f"--data '{source.name}' holds one {source.unit[:-1]}; at least two are needed, one for evaluation."
        )
    largest = _kth_hash(count, max(1, count // 10))
    evaluation = source.subset(_numbers(count, lambda hashes: hashes <= largest))
    evaluation.split, evaluation.left_out = "evaluation", {}  # `train` has the counts of all images
    train = source.subset(_numbers(count, lambda hashes: hashes > largest))
    return Splits(train, evaluation, "held-out 10% of train")


def _hashes(count: int) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
    """Yield the distinct hashes of some indices at a time, and the first of these indices."""
    for start in range(0, count, _PART):
        indices = np.arange(start, min(start + _PART, count), dtype=np.uint64)
        yield start, splitmix64_array(indices * np.uint64(0x9E3779B97F4A7C15))


def _kth_hash(count: int, k: int) -> np.uint64:
    """Return the k-th smallest hash (from 1) of the indices below `count`, with few of them in memory at a time."""
    leading = np.zeros(2**16, np.int64)  # how many hashes begin with these 16 bits
    for _, hashes in _hashes(count):
        leading += np.bincount((hashes >> np.uint64(48)).astype(np.int64), minlength=2**16)
    up_to = np.cumsum(leading)
    bits = int(np.searchsorted(up_to, k))
    alike = np.concatenate([hashes[hashes >> np.uint64(48) == bits] for _, hashes in _hashes(count)])
    smallest: np.uint64 = np.sort(alike)[k - 1 - (up_to[bits] - leading[bits])]
    return smallest


def _numbers(count: int, belongs: Callable[[npt.NDArray[np.uint64]], Any]) -> npt.NDArray[Any]:
    """Return the indices whose hash belongs to a split, in order."""
    parts = [_compact(np.flatnonzero(belongs(hashes)) + start, count) for start, hashes in _hashes(count)]
    return np.concatenate(parts)


def _compact(numbers: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """Return numbers below `count` in four bytes each if they fit."""
    return numbers.astype(np.uint32 if count <= 2**32 else np.int64)
