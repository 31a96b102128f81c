"""Sources of images with a class for every pixel, for `pecobook segment --data`.

A source has one of these layouts:

    ROOT/train/images + ROOT/train/masks, and the same under val/ or test/ (more names: names.py)
    ROOT/images/training + ROOT/annotations/training, and validation/      ADE20K's layout
    ROOT/images + ROOT/masks                                               10% of the images are held out
    hf:owner/name                                                          an image column and a mask column

A mask has the name of its image, except for the extension. The pixels of a mask are class numbers (grey or palette), or
colours that the class file lists. segmentation_check.py checks all pairs before training starts and reports problems by
file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pecobook.data.decode import BadImage, header_size, read_file
from pecobook.data.dense.class_files import find_class_file, read_classes
from pecobook.data.dense.mask_files import Pixels, read_pixels
from pecobook.data.dense.segmentation_classes import IGNORE, MaskClasses, MaskCounts, ignored_values, make_classes
from pecobook.data.dense.segmentation_pairs import find_pairs
from pecobook.data.names import MASK_COLUMNS, group_by_split
from pecobook.data.source import ImageSource, Integers, Splits, Store, hold_out, unused_splits
from pecobook.data.table_store import TableStore, store_of_column
from pecobook.data.tables import load_hub
from pecobook.errors import DataError, listed
from pecobook.utils.printer import say


class MaskStore(Store):
    """A store whose rows hold an image and its mask.

    Attributes:
        left_out: reason -> number of images and masks that belong to no row.
    """

    def __init__(self) -> None:
        self.left_out: dict[str, int] = {}

    def read_mask(self, row: int) -> bytes:
        """Read the encoded mask. Raises BadImage."""
        raise NotImplementedError

    def identify_mask(self, row: int) -> str:
        """Return a human-readable name of the mask."""
        raise NotImplementedError


class PairStore(MaskStore):
    """Pairs of an image file and a mask file under one folder."""

    def __init__(self, root: Path, pairs: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self.root, self.pairs = root, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def identify(self, row: int) -> str:
        """Return the relative path of the image."""
        return self.pairs[row][0]

    def identify_mask(self, row: int) -> str:
        """Return the relative path of the mask."""
        return self.pairs[row][1]

    def file(self, row: int) -> Path:
        """Return the path of the image."""
        return self.root / self.pairs[row][0]

    def read_mask(self, row: int) -> bytes:
        """Read the encoded mask."""
        name = self.pairs[row][1]
        return read_file(self.root / name, name)

    def files(self, rows: Integers) -> Iterator[bytes]:
        """Yield the paths of the images and of the masks."""
        return (os.fsencode(self.root / name) for row in rows.tolist() for name in self.pairs[row])

    def digest(self, rows: Integers) -> str:
        """Return a hash of the relative paths."""
        return hashlib.sha256(repr([self.pairs[row] for row in rows.tolist()]).encode()).hexdigest()


class TablePairStore(MaskStore):
    """The image column and the mask column of one table.

    Args:
        images: the column of images.
        masks: the column of masks.
        column: the name of the mask column.
    """

    def __init__(self, images: TableStore, masks: TableStore, column: str) -> None:
        super().__init__()
        self._images, self._masks, self._column = images, masks, column

    def __len__(self) -> int:
        return len(self._images)

    def identify(self, row: int) -> str:
        """Return the name of the split and the number of the row."""
        return self._images.identify(row)

    def identify_mask(self, row: int) -> str:
        """Return the name of the split, the number of the row, and the name of the mask column."""
        return f"{self.identify(row)} ({self._column})"

    def file(self, row: int) -> bytes:
        """Read the encoded image."""
        return self._images.file(row)

    def read_mask(self, row: int) -> bytes:
        """Read the encoded mask."""
        return self._masks.file(row)

    def num_bytes(self) -> int:
        """Return the bytes of all encoded images and masks."""
        return self._images.num_bytes() + self._masks.num_bytes()

    def content(self, row: int) -> bytes:
        """Read the encoded image and the encoded mask."""
        return self.file(row) + self.read_mask(row)

    def digest(self, rows: Integers) -> str:
        """Return a hash of the identities of both columns and of the row numbers."""
        return self._images.digest(rows) + self._masks.digest(rows)


class SegmentationSource(ImageSource):
    """The images of one split with their masks.

    Attributes:
        mask_classes: the meaning of the masks' pixels.
        counts: the pixels of all masks, if `verify` has read them.
        unreadable: the pairs that `verify` has left out because their image or mask cannot be read.
    """

    counts: MaskCounts | None = None
    unreadable: Sequence[BadImage] = ()

    def __init__(self, store: MaskStore, mask_classes: MaskClasses, *, name: str, split: str) -> None:
        super().__init__(store, name=name, split=split, left_out=store.left_out)
        self.mask_classes, self._masks, self._table = mask_classes, store, mask_classes.table()

    def read_mask(self, index: int) -> Tensor:
        """Read the class of every pixel, int16 (H, W), with `IGNORE` at ignored pixels. Raises BadImage."""
        classes = self._table[self._values(index)]
        if classes.min() < IGNORE:
            raise BadImage(self.identify_mask(index), "a pixel has no class")
        return torch.from_numpy(classes)

    def sample(self, index: int, shortest: int = 0) -> tuple[Any, ...]:  # noqa: ARG002
        """Read the image uint8 (3, H, W) and the classes int16 (H, W), which is never reduced. Raises BadImage."""
        image, mask = self.read(index), self.read_mask(index)
        if image.shape[1:] != mask.shape:
            raise BadImage(self.identify_mask(index), "the mask does not have the size of its image")
        return image, mask

    def subset(self, indices: Iterable[int] | Integers) -> Self:
        """Return a source with only the given images, in the given order, whose masks are not counted yet."""
        part = super().subset(indices)
        part.counts, part.unreadable = None, ()
        return part

    def with_mask_classes(self, mask_classes: MaskClasses) -> Self:
        """Return the source with another meaning of the masks' pixels."""
        part = self.subset(range(len(self)))
        part.mask_classes, part._table = mask_classes, mask_classes.table()
        return part

    def read_pixels(self, index: int) -> Pixels:
        """Read the pixels of a mask as the file has them. Raises BadImage."""
        row, colours = self._row(index), self.mask_classes.colours is not None
        return read_pixels(self._masks.read_mask(row), name=self._masks.identify_mask(row), colours=colours)

    def read_values(self, index: int) -> tuple[npt.NDArray[np.int64], tuple[int, int]]:
        """Read the pixel values of a mask (H, W), and the image's (height, width) from its header. Raises BadImage."""
        return self._values(index), self.header_size(index)

    def _values(self, index: int) -> npt.NDArray[np.int64]:
        meaning = self.mask_classes
        return self.read_pixels(index).values(meaning.colours, stretched=meaning.stretched)

    def header_size(self, index: int) -> tuple[int, int]:
        """Read the height and width of image `index` from its header. Raises BadImage."""
        size = header_size(self._masks.encoded(self._row(index)))
        if size is None:
            raise BadImage(self.identify(index), "not an image")
        return size

    def identify_mask(self, index: int) -> str:
        """Return a human-readable name of the mask of image `index`."""
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
    """Open a source of images with masks, in a layout that the top of this file lists.

    Without a class file and --mask-values, the classes are unknown until `verify` has read all masks
    (segmentation_check.py).

    Args:
        data: a folder, or hf:owner/name.
        classes: file of class names; an empty string stands for classes.txt, or another file of
            `class_files`, in the folder, if there is one.
        mask_values: the pixel value of each class, if they are not 0, 1, 2, ...
        ignore: pixel values, or names of classes, that the loss and the scores ignore.
        skip_bad: leave out images without a mask and masks without an image, and print their number.

    Raises:
        DataError: there is no such source, or an image has no mask, or a mask has no image; the message lists these.
        ConfigError: the settings contradict each other.
    """
    root = Path(data).expanduser()
    file = Path(classes).expanduser() if classes else find_class_file(root)
    mask_classes = make_classes(read_classes(file) if file else None, mask_values=mask_values, ignore=ignore)
    given_classes = mask_classes or MaskClasses((), (), ignored_values(ignore), None)

    files = (file,) if file else ()
    is_usual = file is None or bool(classes) or file.name == "classes.txt"
    notes = () if is_usual else (f"The classes are those of {file}.",)
    stores = _hub_stores(data) if data.startswith("hf:") else _folder_stores(data, root, skip_bad)
    train = SegmentationSource(stores["train"], given_classes, name=data, split="train")
    name = next((name for name in ("validation", "test") if name in stores), None)
    if name is None:
        return dataclasses.replace(hold_out(train), notes=notes, files=files)
    evaluation = SegmentationSource(stores[name], given_classes, name=data, split="evaluation")
    unused = unused_splits({split: len(store) for split, store in stores.items()}, name)
    return Splits(train, evaluation, name, unused, notes, files)


def _folder_stores(data: str, root: Path, skip_bad: bool) -> dict[str, MaskStore]:
    if not root.is_dir():
        raise DataError(
            f"--data '{data}' is not a folder. Give a folder with images/ and masks/, or give hf:owner/name."
        )
    found = find_pairs(data, root)
    if found.unpaired and skip_bad and found.pairs:
        say(f"{len(found.unpaired)} images or masks are left out, because they have no mask or image.")
    elif found.unpaired:
        lines = listed(found.unpaired)
        raise DataError(f"--data '{data}':\n{lines}\nAdd the missing files, or leave these out (--skip-bad).")
    # Folders alone declare splits, since a file's name may begin with "test" by chance.
    names = found.splits or [f"{image.rpartition('/')[0]}/x" for image, _ in found.pairs]
    groups, undeclared = group_by_split(names)
    stores = {split: PairStore(root, [found.pairs[number] for number in numbers]) for split, numbers in groups.items()}
    outside = {"pairs outside the folders of splits": len(undeclared)} if undeclared else {}
    stores["train"].left_out = {**found.left_out, **outside}
    return dict(stores)


def _hub_stores(data: str) -> dict[str, MaskStore]:
    from datasets import Image

    stores: dict[str, MaskStore] = {}
    for split, (name, config, declared, table) in load_hub(data)[0].items():
        columns = [column for column, kind in table.features.items() if isinstance(kind, Image)]
        mask = next((column for column in MASK_COLUMNS if column in columns), None)
        image = "image" if "image" in columns else next((column for column in columns if column != mask), None)
        if mask is None or image is None:
            raise DataError(
                f"--data '{data}' has the image columns {', '.join(columns) or 'none'}: one column must be 'image', "
                f"another one {' or '.join(MASK_COLUMNS[:4])}."
            )
        files = [(f"{name} {declared}", len(table))]
        images, masks = (
            store_of_column(table, column, files, repr((name, config, declared, len(table), column)))
            for column in (image, mask)
        )
        stores[split] = TablePairStore(images, masks, mask)
    return stores
