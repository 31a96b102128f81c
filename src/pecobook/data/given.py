"""Images passed from Python code: a torch data set, or a list of files, for one split or for several by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from pecobook.data.decode import BadImage
from pecobook.data.folders import FileStore
from pecobook.data.parts import Contents, Labels, Part, distinct_names
from pecobook.data.source import Integers, Store, hash_some
from pecobook.errors import DataError, first_line

_SPLITS = ("train", "validation", "test")


def given_contents(value: Any, name: str) -> Contents:
    """Return the splits of an object; `name` is what the settings call it. Raises DataError."""
    parts = value if isinstance(value, Mapping) else {"train": value}
    if "train" not in parts or not set(parts) <= set(_SPLITS):
        raise DataError(f"data={name}: give the splits train and validation or test, not {', '.join(map(str, parts))}.")
    return Contents({split: _part(part, name) for split, part in parts.items()})


def _part(value: Any, name: str) -> Part:
    if isinstance(value, list | tuple):
        return _files([Path(file).absolute() for file in value])
    if isinstance(value, IterableDataset) or not (hasattr(value, "__getitem__") and hasattr(value, "__len__")):
        raise DataError(f"data={name}: images are read in any order, so a data set needs __len__ and __getitem__.")
    store, labels = DatasetStore(value), _labels(value, name)
    rows = np.arange(len(store), dtype=np.int64)
    return Part(store, rows, labels, "" if labels else "the data set has no attribute `targets` with their classes")


def _files(files: list[Path]) -> Part:
    import pyarrow as pa

    missing = [file for file in files if not file.is_file()]
    if missing:
        raise DataError(f"data=: {len(missing)} of {len(files)} files do not exist, the first: '{missing[0]}'.")
    store = FileStore(Path("/"), pa.chunked_array([pa.array([os.fsencode(file) for file in files], pa.binary())]))
    return Part(store, np.arange(len(files), dtype=np.int64), None, "a list of files has none")


def _labels(dataset: Any, name: str) -> Labels | None:
    """Return the labels that torchvision's data sets have: `targets`, and `classes` for their names."""
    targets = getattr(dataset, "targets", None)
    if targets is None:
        return None
    codes = np.asarray(targets)
    if codes.shape != (len(dataset),) or not np.issubdtype(codes.dtype, np.integer):
        raise DataError(f"data={name}: targets must be {len(dataset)} whole numbers, one for each image.")
    classes = getattr(dataset, "classes", None) or [str(number) for number in range(int(codes.max(initial=-1)) + 1)]
    if codes.size and not -1 <= codes.min() <= codes.max() < len(classes):
        raise DataError(
            f"data={name}: targets must lie from 0 to {len(classes) - 1}: there are {len(classes)} classes."
        )
    # torchvision's ImageNet names a class by all its synonyms, and has two of the name "crane".
    names = [", ".join(name) if isinstance(name, tuple) else str(name) for name in classes]
    return Labels(codes.astype(np.int64), distinct_names(names))


class DatasetStore(Store):
    """The items of a data set: an image, or a tuple or dictionary with the image first or under `image`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def identify(self, row: int) -> str:
        """Return the class of the data set and the number of the item."""
        return f"{type(self.dataset).__name__}[{row}]"

    def read(self, row: int, shortest: int = 0) -> Tensor:  # noqa: ARG002
        """Return the image of an item: uint8 (3, H, W). Raises BadImage."""
        try:
            item = self.dataset[row]
            image = item["image"] if isinstance(item, Mapping) else item[0] if isinstance(item, list | tuple) else item
            return as_bytes(image)
        except Exception as error:  # from the user's code: one image that fails must not stop a run
            raise BadImage(self.identify(row), first_line(error)) from error

    def content(self, row: int) -> bytes:
        """Return the bytes of the pixels. Raises BadImage."""
        return self.read(row).numpy().tobytes()

    def digest(self, rows: Integers) -> str:
        """Return a hash of the class, the number of items and the pixels of a few."""
        digest = hash_some(self.content, rows)
        digest.update(f"{type(self.dataset).__qualname__} {len(rows)}".encode())
        return digest.hexdigest()


def as_bytes(image: Any) -> Tensor:
    """Convert a Pillow image, an array (H, W[, C]) of bytes, or a tensor (C, H, W) to uint8 (3, H, W).

    Tensors are bytes, or floats in [0, 1]. Raises ValueError for anything else.
    """
    if hasattr(image, "convert"):  # a Pillow image
        image = np.asarray(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError(f"an array must be of uint8, not {image.dtype}: give a tensor of floats in [0, 1]")
        image = torch.from_numpy(np.array(image if image.ndim == 3 else image[..., None])).permute(2, 0, 1)
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        what = f"{type(image).__name__} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"an image is of Pillow, an array (H, W, 3) or a tensor (3, H, W), not {what}")
    if image.is_floating_point():
        if not bool(((image >= 0) & (image <= 1)).all()):
            raise ValueError("floats must lie in [0, 1]: leave out the normalisation")
        image = (image * 255).round().to(torch.uint8)
    if image.dtype != torch.uint8:
        raise ValueError(f"a tensor must be of uint8 or floats, not {image.dtype}")
    rgb: Tensor = image.expand(3, -1, -1)
    return rgb.contiguous()


class GivenView:
    """Applies a transform, from bytes (3, H, W) to bytes or floats (C, H', W'), before a view of a stage.

    Torch's random numbers are drawn from a seed of the view, so a resumed run draws the same.
    """

    def __init__(self, transform: Any, view: Any) -> None:
        self.transform, self.view = transform, view

    def __call__(self, image: Tensor, view_key: int) -> dict[str, Any]:
        """Return the stage's view of the transformed image. Raises BadImage."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(view_key >> 1)
            changed = self.transform(image)
        try:
            return self.view(as_bytes(changed), view_key)  # type: ignore[no-any-return]
        except ValueError as error:
            raise DataError(f"transform= returned what is no image: {error}.") from None
