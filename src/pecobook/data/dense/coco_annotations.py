"""The images and objects of one file in COCO's format, packed into arrays.

Objects are stored as arrays and one buffer of bytes, which forked workers share instead of copying: COCO's training set
has 860,000 objects. A mask keeps the form that it has in the file (polygons, or run lengths, compressed or not) until
it is decoded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pecobook.data.decode import BadImage, Range, decode, header_size, read_file
from pecobook.data.dense.coco_values import format_size
from pecobook.data.source import Integers

Floats = npt.NDArray[np.float64]


class PackedBytes:
    """Byte strings in one buffer."""

    def __init__(self, items: Sequence[bytes]) -> None:
        self.ends = np.cumsum([len(item) for item in items], dtype=np.int64)
        self.buffer = np.frombuffer(b"".join(items), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> bytes:
        start = int(self.ends[number - 1]) if number else 0
        return self.buffer[start : int(self.ends[number])].tobytes()


@dataclasses.dataclass(eq=False)
class Annotations:
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
    segments: PackedBytes | None
    """The mask of each object as JSON; None if no object has a mask."""
    category_names: dict[int, str]
    """Category id -> name, in ascending order of the ids."""
    left_out: dict[str, int] = dataclasses.field(default_factory=dict)
    """Reason -> number of images and objects of the file that training and scores do not use."""
    value_range: Range | None = None
    """The values that become black and white in images with more than 8 bits."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def read(self, row: int, shortest: int = 0) -> Tensor:
        """Read and decode the image of a row: uint8 (3, H, W), reduced as `decode` says. Raises BadImage."""
        path = self.path(row)
        data = read_file(path)
        image = decode(data, name=str(path), value_range=self.value_range, shortest=shortest)
        size = header_size(data) if shortest else (image.shape[1], image.shape[2])
        if size and size != tuple(self.sizes[row]):
            raise BadImage(str(path), f"{format_size(size)}, not {format_size(self.sizes[row])} as in its annotations")
        return image

    def path(self, row: int) -> Path:
        """Return the path of the image of a row."""
        return self.root / str(self.names[row])

    def identify(self, row: int) -> str:
        """Return the path of the image of a row as text."""
        return str(self.path(row))

    def files(self, rows: Integers) -> Iterator[bytes]:
        """Yield the paths of the images of the rows."""
        return (os.fsencode(self.root / name) for name in self.names[rows].tolist())

    def digest(self, rows: Integers) -> str:
        """Return a hash of the images' names and of all objects."""
        digest = hashlib.sha256("\0".join(self.names[rows].tolist()).encode())
        for array in (self.starts, self.boxes, self.categories, self.crowd):
            digest.update(array.tobytes())
        if self.segments is not None:
            digest.update(self.segments.buffer.tobytes())
        return digest.hexdigest()
