"""Makes sources of every form, of images that a test can identify by their one pixel value."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pecobook.data.source import ImageSource


def png(value: int) -> bytes:
    """Encode an image of 4 x 6 pixels that all have one value, by which a test can identify the image."""
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(value))
    return path


def values(source: ImageSource) -> list[int]:
    return [int(source.read(index)[0, 0, 0]) for index in range(len(source))]


def names(source: ImageSource) -> list[str]:
    return [source.identify(index) for index in range(len(source))]


def labels(source: ImageSource) -> list[str] | None:
    if source.labels is None or source.classes is None:
        return None
    assert source.labels.dtype == np.int64
    return [source.classes[label] for label in source.labels]


def make_parquet(folder: Path, count: int = 12) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": png(number), "path": f"{number}.png"} for number in range(count)]
    table = pa.table({"image": rows, "label": [number % 3 for number in range(count)]})
    pq.write_table(table, folder / "data.parquet", row_group_size=5)
    return folder / "data.parquet"


def make_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(numbers: Iterable[int]) -> Iterable[tuple[str, bytes]]:
    for number in numbers:
        yield f"{number:04}.png", png(number)
        yield f"{number:04}.cls", str(number % 3 + 8).encode()
