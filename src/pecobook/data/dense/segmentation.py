"""Images with a class for every pixel: what `pecobook segment --data` names.

    ROOT/train/images + ROOT/train/masks, and the same under val/, validation/ or test/
    ROOT/images/training + ROOT/annotations/training, and validation/      ADE20K's layout
    ROOT/images + ROOT/masks                                               a tenth of them is held out
    hf:owner/name                                                          an image column and a mask column

A mask is named as its image, but for the extension. Its pixels are class numbers (grey or palette), or colours that the
class file names. What is wrong with a pair is found before training starts (segmentation_check.py), and said by file.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pecobook.data.decode import BadImage, decode, header_size
from pecobook.data.dense.segmentation_classes import (
    IGNORE,
    Classes,
    decode_mask,
    ignored_values,
    make_classes,
    read_classes,
)
from pecobook.data.source import IMAGE_EXTENSIONS, ImageSource, Integers, Splits, Store, group_by_split, hold_out
from pecobook.data.tables import TableStore, hub_tables
from pecobook.errors import DataError, listed

_IMAGE_FOLDERS = ("images", "image", "img", "imgs", "jpegimages")
_MASK_FOLDERS = ("masks", "mask", "annotations", "labels", "label", "segmentationclass")
_MASK_ENDINGS = ("_mask", "_masks", "_label", "_labels", "_seg", "_gt")
_MASK_COLUMNS = ("mask", "annotation", "label", "segmentation", "segmentation_mask", "annotations", "labels", "gt")


class MaskStore(Store, Protocol):
    """Images and, at the same rows, masks."""

    def read_image(self, row: int) -> bytes:
        """The encoded image; raises BadImage."""

    def read_mask(self, row: int) -> bytes:
        """The encoded mask; raises BadImage."""

    def identify_mask(self, row: int) -> str:
        """A name by which a person finds the mask."""


class PairStore:
    """Files of images and of masks under one folder."""

    def __init__(self, root: Path, pairs: Sequence[tuple[str, str]]) -> None:
        self.root, self.pairs = root, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def identify(self, row: int) -> str:
        """The image's relative path."""
        return self.pairs[row][0]

    def identify_mask(self, row: int) -> str:
        """The mask's relative path."""
        return self.pairs[row][1]

    def _bytes(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise BadImage(name, error.strerror or str(error)) from error

    def read_image(self, row: int) -> bytes:
        """The encoded image."""
        return self._bytes(self.pairs[row][0])

    def read(self, row: int) -> Tensor:
        """The image, uint8 (3, H, W)."""
        return decode(self.read_image(row), name=self.pairs[row][0])

    def read_mask(self, row: int) -> bytes:
        """The encoded mask."""
        return self._bytes(self.pairs[row][1])

    def digest(self, rows: Integers) -> str:
        """A hash of the relative paths."""
        return hashlib.sha256(repr([self.pairs[row] for row in rows.tolist()]).encode()).hexdigest()


class TablePairStore:
    """Two columns of one table.

    Args:
        images: the one.
        masks: the other.
        column: its name.
    """

    def __init__(self, images: TableStore, masks: TableStore, column: str) -> None:
        self._images, self._masks, self._column = images, masks, column

    def __len__(self) -> int:
        return len(self._images)

    def identify(self, row: int) -> str:
        """The split and the row in it."""
        return self._images.identify(row)

    def identify_mask(self, row: int) -> str:
        """The same, and the mask's column."""
        return f"{self.identify(row)} ({self._column})"

    def read_image(self, row: int) -> bytes:
        """The encoded image."""
        return self._images.encoded(row)

    def read(self, row: int) -> Tensor:
        """The image, uint8 (3, H, W)."""
        return self._images.read(row)

    def read_mask(self, row: int) -> bytes:
        """The encoded mask."""
        return self._masks.encoded(row)

    def digest(self, rows: Integers) -> str:
        """A hash of what both columns are and of the rows' numbers."""
        return self._images.digest(rows) + self._masks.digest(rows)


class SegmentationSource(ImageSource):
    """Images and masks; `sample` gives both."""

    def __init__(self, store: MaskStore, meaning: Classes, *, name: str, split: str, rows: Integers) -> None:
        super().__init__(store, name=name, split=split, rows=rows)
        self.meaning, self._masks, self._table = meaning, store, meaning.table()

    def read_mask(self, index: int) -> Tensor:
        """Class of every pixel, int16 (H, W), `IGNORE` where none counts. Raises BadImage."""
        row = self._row(index)
        values = decode_mask(self._masks.read_mask(row), self.meaning.colours, name=self._masks.identify_mask(row))
        classes = self._table[values]
        if classes.min() < IGNORE:
            raise BadImage(self._masks.identify_mask(row), "a pixel has no class")
        return torch.from_numpy(classes)

    def sample(self, index: int) -> tuple[Any, ...]:
        """Image uint8 (3, H, W) and classes int16 (H, W). Raises BadImage."""
        image, mask = self.read(index), self.read_mask(index)
        if image.shape[1:] != mask.shape:
            raise BadImage(self._masks.identify_mask(self._row(index)), "the mask is not of its image's size")
        return image, mask

    def subset(self, indices: Iterable[int] | Integers) -> SegmentationSource:
        """The same source with only these images, in this order."""
        chosen = super().subset(indices)
        rows = cast("Integers", chosen._rows)
        return SegmentationSource(self._masks, self.meaning, name=self.name, split=self.split, rows=rows)

    def with_classes(self, meaning: Classes) -> SegmentationSource:
        """The same images, their pixels read in another way."""
        rows = cast("Integers", self._rows)
        return SegmentationSource(self._masks, meaning, name=self.name, split=self.split, rows=rows)

    def values_of(self, index: int) -> tuple[npt.NDArray[np.int64], tuple[int, int]]:
        """Pixel values of a mask (H, W), and the size of its image as its header says. Raises BadImage."""
        row = self._row(index)
        name = self._masks.identify_mask(row)
        values = decode_mask(self._masks.read_mask(row), self.meaning.colours, name=name)
        size = header_size(self._masks.read_image(row))
        if size is None:
            raise BadImage(self.identify(index), "not an image")
        return values, size

    def mask_name(self, index: int) -> str:
        """A name by which a person finds the mask."""
        return self._masks.identify_mask(self._row(index))


# -------------------------------------------------------------------------------------------------------------- opening


def open_segmentation(
    data: str,
    *,
    classes: str = "",
    mask_values: Sequence[str] = (),
    ignore: Sequence[str] = ("255",),
    skip_bad: bool = False,
) -> Splits:
    """Open a source of images with masks; see the top of this file.

    Without a class file and values, classes are not known before all masks were looked at (segmentation_check.py).

    Args:
        data: a folder, or hf:owner/name.
        classes: file of class names; empty takes classes.txt in the folder, where it is.
        mask_values: pixel value of each class, where they are not 0, 1, 2, ...
        ignore: pixel values, or names of classes, that count neither in the loss nor in a score.
        skip_bad: leave out images without a mask and masks without an image, and say how many.

    Raises:
        DataError: no such source, or an image without a mask or the other way round; says which.
        ConfigError: settings that do not go together.
    """
    root = Path(data).expanduser()
    file = Path(classes).expanduser() if classes else root / "classes.txt"
    names, colours = read_classes(file) if classes or file.is_file() else (None, None)
    meaning = make_classes(names, colours, mask_values=mask_values, ignore=ignore)
    known = meaning or Classes((), (), ignored_values(ignore), None)

    def source(store: MaskStore, rows: Iterable[int], split: str) -> SegmentationSource:
        return SegmentationSource(store, known, name=data, split=split, rows=np.array(list(rows), np.int64))

    stores = _hub_stores(data) if data.startswith("hf:") else _folder_stores(data, root, skip_bad)
    train = source(stores["train"], range(len(stores["train"])), "train")
    for name in ("validation", "test"):
        if name in stores:
            return Splits(train, source(stores[name], range(len(stores[name])), "evaluation"), name)
    return hold_out(train)


def _folder_stores(data: str, root: Path, skip_bad: bool) -> dict[str, MaskStore]:
    if not root.is_dir():
        raise DataError(f"--data '{data}' is no folder. Give one with images/ and masks/, or hf:owner/name.")
    images, masks = _files(data, root, _IMAGE_FOLDERS), _files(data, root, _MASK_FOLDERS)
    if not images.keys() & masks.keys():
        masks = {_without_ending(key): file for key, file in masks.items()}
    if not images or not masks:
        missing = "images" if not images else "masks"
        raise DataError(
            f"--data '{data}' holds no {missing}: it needs images/ and masks/ (or annotations/), by themselves, under "
            "train/ and val/, or with training/ and validation/ in them."
        )
    alone = sorted(images.keys() ^ masks.keys())
    both = sorted(images.keys() & masks.keys())
    if alone and skip_bad and both:
        print(f"{len(alone)} images or masks have no partner and are left out.", file=sys.stderr)
    elif alone:
        lines = [f"{images.get(key) or masks[key]} has no {'mask' if key in images else 'image'}" for key in alone]
        raise DataError(f"--data '{data}':\n{listed(lines)}\nGive every image a mask, or leave these out (--skip-bad).")
    pairs = [(images[key], masks[key]) for key in both]
    groups = group_by_split([_split_name(image) for image, _ in pairs])
    return {split: PairStore(root, [pairs[number] for number in numbers]) for split, numbers in groups.items()}


def _files(data: str, root: Path, folders: tuple[str, ...]) -> dict[str, str]:
    """Path without the folder's name and the extension, to the path, for every picture under one of `folders`.

    Links to folders are followed, each folder once. Raises DataError for two pictures of one name.
    """
    found: dict[str, str] = {}
    twice: list[str] = []
    seen: set[str] = set()
    for top, inner, names in os.walk(root, followlinks=True):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        parts = Path(top).relative_to(root).parts
        place = next((number for number, part in enumerate(parts) if part.lower() in folders), None)
        own = os.path.realpath(top)
        if own in seen:
            inner.clear()  # a link that leads back
            continue
        seen.add(own)
        if place is None:
            continue
        rest = (*parts[:place], *parts[place + 1 :])
        for name in sorted(names):
            stem, _, extension = name.rpartition(".")
            if stem and not name.startswith(".") and extension.lower() in IMAGE_EXTENSIONS:
                key, file = "/".join((*rest, stem)), "/".join((*parts, name))
                if key in found:
                    twice.append(f"{found[key]} and {file} have one name")
                found[key] = file
    if twice:
        raise DataError(f"--data '{data}':\n{listed(twice)}\nAn image and its mask are found by their names: keep one.")
    return found


def _without_ending(key: str) -> str:
    """A mask's name as its image has it."""
    return next((key.removesuffix(ending) for ending in _MASK_ENDINGS if key.endswith(ending)), key)


def _split_name(image: str) -> str:
    """The folders of an image alone, since names of files often begin with test or train by chance."""
    return image.rpartition("/")[0] + "/x"


def _hub_stores(data: str) -> dict[str, MaskStore]:
    from datasets import Image

    found: dict[str, MaskStore] = {}
    for split, (name, config, declared, table) in hub_tables(data).items():
        pictures = [column for column, kind in table.features.items() if isinstance(kind, Image)]
        mask = next((column for column in _MASK_COLUMNS if column in pictures), None)
        image = "image" if "image" in pictures else next((column for column in pictures if column != mask), None)
        if mask is None or image is None:
            raise DataError(
                f"--data '{data}' has the image columns {', '.join(pictures) or 'none'}: one must be 'image', "
                f"one {' or '.join(_MASK_COLUMNS[:4])}."
            )
        files = [(f"{name} {declared}", len(table))]
        images, masks = (
            TableStore(
                table.select_columns([column]).cast_column(column, Image(decode=False)),
                column,
                files,
                repr((name, config, declared, len(table), column)),
            )
            for column in (image, mask)
        )
        found[split] = TablePairStore(images, masks, mask)
    return found
