"""The images and objects of one file in COCO's format, packed into arrays.

Objects are stored as arrays, which forked workers share instead of copying: COCO's training set
has 860,000 objects. A mask keeps the form that it has in the file (polygons, or run lengths, compressed or not) until
it is decoded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pecobook.data.decode import BadImage, decode, header_size
from pecobook.data.dense.coco_values import format_size
from pecobook.data.source import Integers, Store

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(eq=False)
class Annotations(Store):
    """The images (rows) and objects of one file; the objects of row r have the indices starts[r] to starts[r + 1] - 1.

    R images, A objects.
    """

    root: Path
    """Folder of the images."""
    names: npt.NDArray[np.str_]
    """Path of each image relative to `root`, (R,)."""
    image_ids: Integers
    """(R,)"""
    sizes: Integers
    """Height and width of each image, (R, 2)."""
    starts: Integers
    """(R + 1,)"""
    boxes: Floats
    """x, y, width and height of each object's box in pixels, as in the file: (A, 4)."""
    categories: Integers
    """Category id of each object, (A,)."""
    crowd: npt.NDArray[np.bool_]
    """Whether each entry is a crowd, that is many objects under one mask, which training and scores ignore: (A,)."""
    areas: Floats
    """Area of each object in pixels, (A,)."""
    segments: Any
    """The mask of each object as JSON, in an Arrow array of binary values; None if no object has a mask."""
    category_names: dict[int, str]
    """Category id -> name, in ascending order of the ids."""
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    """Reason -> number of images and objects of the file that training and scores do not use."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def segments_of(self, numbers: Iterable[int]) -> list[bytes] | None:
        """Return the masks of objects as JSON; None if no object has a mask."""
        return None if self.segments is None else [self.segments[number].as_py() for number in numbers]

    def read(self, row: int, shortest: int = 0) -> Tensor:
        """Read and decode the image of a row: uint8 (3, H, W), reduced as `decode` says. Raises BadImage."""
        data, stated = self.encoded(row), self.sizes[row]
        image = decode(data, name=self.identify(row), value_range=self.value_range, shortest=shortest)
        size = header_size(data) if shortest else (image.shape[1], image.shape[2])
        if size and size != tuple(stated):
            raise BadImage(self.identify(row), f"{format_size(size)}, not {format_size(stated)} as in its annotations")
        return image

    def file(self, row: int) -> Path:
        """Return the path of the image of a row."""
        return self.root / str(self.names[row])

    def identify(self, row: int) -> str:
        """Return the path of the image of a row as text."""
        return str(self.file(row))

    def files(self, rows: Integers) -> Iterator[bytes]:
        """Yield the paths of the images of the rows."""
        return (os.fsencode(self.root / name) for name in self.names[rows].tolist())

    def digest(self, rows: Integers) -> str:
        """Return a hash of the images' names and of all objects."""
        digest = hashlib.sha256("\0".join(self.names[rows].tolist()).encode())
        for array in (self.starts, self.boxes, self.categories, self.crowd):
            digest.update(array.tobytes())
        if self.segments is not None:
            digest.update(b"".join(self.segments.to_pylist()))
        return digest.hexdigest()
