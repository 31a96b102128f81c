"""The source `photos`: photographs installed with scikit-image and scikit-learn, for a machine without a network.

Each photograph is cut into tiles. A tile is an image, and the photograph is its class. The files are read directly,
without importing the libraries: this is faster, and the libraries' loaders may try to download.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pecobook.data.decode import BadImage, decode
from pecobook.data.source import ImageSource, Integers, Splits, Store
from pecobook.errors import DataError
from pecobook.utils.extras import require

TILE = 48
MAX_SHORT_SIDE = 512

# Class name -> package and file. Only the left image of the stereo pair is used: the right one shows nearly the same
# pixels, so a region held out in one image would be a training region of the other. Scans of text are not photographs.
PHOTOS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "camera": ("skimage", "data/camera.png"),
    "cell": ("skimage", "data/cell.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "immunohistochemistry": ("skimage", "data/ihc.png"),
    "moon": ("skimage", "data/moon.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
}


class PhotoStore(Store):
    """The tiles of all photographs, ordered by photograph and then by row.

    Args:
        grids: the number of tiles (down, across) of each photograph, in the order of the photographs' names.
    """

    def __init__(self, grids: dict[str, tuple[int, int]]) -> None:
        self._grids = grids
        self._names = list(grids)
        self._starts = np.cumsum([0, *(down * across for down, across in grids.values())])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _locate(self, row: int) -> tuple[str, int]:
        photo = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._names[photo], row - int(self._starts[photo])

    def identify(self, row: int) -> str:
        """Return the name of the photograph and the number of the tile."""
        return "{} tile {}".format(*self._locate(row))

    def read(self, row: int, shortest: int = 0) -> Tensor:  # noqa: ARG002
        """Return the tile of a row: uint8 (3, 48, 48)."""
        name, tile = self._locate(row)
        i, j = divmod(tile, self._grids[name][1])
        return load_photo(name)[:, i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE].clone()

    def files(self, _rows: Integers) -> list[bytes]:
        """Return the paths of all photographs."""
        return [os.fsencode(_path(name)) for name in self._names]

    def digest(self, rows: Integers) -> str:
        """Return a hash of the photographs' names, their grids, and the rows."""
        return hashlib.sha256(repr(self._grids).encode() + rows.astype("<i8").tobytes()).hexdigest()


def open_photos() -> Splits:
    """Open the built-in photographs: 48 x 48 px tiles of 17 photographs.

    Each photograph is first scaled down to a short side of at most 512 px. In every photograph, regions of 2 x 2 tiles
    along diagonals, about a quarter of the tiles, are held out for evaluation; no training tile shares a pixel with
    them.

    Raises:
        ConfigError: scikit-image or scikit-learn is not installed.
        DataError: an installed photograph is missing.
    """
    from PIL import Image

    require("photos", "--data photos")
    grids = {}
    labels_by_photo, held_out_by_photo = [], []
    for number, name in enumerate(PHOTOS):
        with Image.open(_path(name)) as image:  # reads only the header
            width, height = _reduced_size(*image.size)
        down, across = height // TILE, width // TILE
        grids[name] = (down, across)
        block_row, block_column = np.indices((down, across)) // 2
        held_out_by_photo.append(((block_row + block_column) % 4 == 2).ravel())
        labels_by_photo.append(np.full(down * across, number, dtype=np.int64))
    store, labels, is_held_out = PhotoStore(grids), np.concatenate(labels_by_photo), np.concatenate(held_out_by_photo)
    train, evaluation = (
        ImageSource(store, name="photos", split=split, rows=rows, classes=tuple(PHOTOS), labels=labels[rows])
        for split, rows in (("train", np.flatnonzero(~is_held_out)), ("evaluation", np.flatnonzero(is_held_out)))
    )
    return Splits(train, evaluation, "held-out regions")


def _path(name: str) -> Path:
    package, relative = PHOTOS[name]
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / relative
        if path.is_file():
            return path
    distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
    raise DataError(
        f"--data photos: the installed {distribution} lacks the photograph '{name}' ({package}/{relative}).\n"
        f"Reinstall it (pip install --force-reinstall {distribution}) or give a folder of images."
    )


def _reduced_size(width: int, height: int) -> tuple[int, int]:
    scale = min(1.0, MAX_SHORT_SIDE / min(width, height))
    return round(width * scale), round(height * scale)


@functools.cache
def load_photo(name: str) -> Tensor:
    """Load a photograph, uint8 (3, H, W). It is decoded once and shared with processes forked later."""
    from PIL import Image

    try:
        pixels = decode(_path(name).read_bytes(), name=name)
    except OSError as error:
        raise BadImage(name, error.strerror or str(error)) from error
    height, width = pixels.shape[1:]
    if (width, height) == _reduced_size(width, height):
        return pixels
    # Pillow resizes, because its result is the same on every machine.
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    reduced = image.resize(_reduced_size(width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(reduced)).permute(2, 0, 1).contiguous()
