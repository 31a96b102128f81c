"""The folders with a few labelled images on which the duel fine-tunes (docs/study.md)."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.io import encode_png

from pecobook.data.decode import BadImage, read_file
from pecobook.data.names import IMAGE_EXTENSIONS
from pecobook.data.source import ImageSource, Splits
from pecobook.utils.printer import say

LABELS_PER_CLASS = 100
FOLDERS = {"few": "images", "tune": "images-tuning"}
"""The name of the image folder for each kind of run."""
Part = tuple[ImageSource, list[int]]
"""A source and the indices of the images taken from it."""


def few_labels(splits: Splits, kind: str) -> tuple[Part, Part]:
    """Choose the images that a kind of run learns from and those it is tested on; always the same for a source.

    `few` learns from 100 images of each class and is judged by the test images. `tune` is judged by the same number of
    other training images; a class of fewer than 200 images is split in half.

    Args:
        splits: the images, with labels.
        kind: `few` or `tune`.
    """
    labels = splits.train.labels
    assert labels is not None
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    learned: list[int] = []
    judging: list[int] = []
    for numbers in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        size = min(LABELS_PER_CLASS, len(numbers) if kind == "few" else max(len(numbers) // 2, 1))
        learned += numbers[:size].tolist()
        judging += numbers[size : 2 * size].tolist()
    tested = splits.evaluation, list(range(len(splits.evaluation)))
    return (splits.train, sorted(learned)), tested if kind == "few" else (splits.train, sorted(judging))


def write_images(splits: Splits, kind: str, out: Path) -> None:
    """Write the folder for a kind of run into `out`, with parts `train` and `test`, unless it exists."""
    folder = out / FOLDERS[kind]
    if folder.exists():
        return
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    for part, (source, numbers) in zip(("train", "test"), few_labels(splits, kind), strict=True):
        for number in numbers:
            _write_image(source, number, partial / part)
    try:
        partial.rename(folder)
    except OSError:  # another process wrote the folder meanwhile
        shutil.rmtree(partial)


def _write_image(source: ImageSource, number: int, folder: Path) -> None:
    """Write an image into its class folder, as the original file or else as PNG; an unreadable one is skipped."""
    assert source.labels is not None
    try:
        content = source.file(number)
        if isinstance(content, Path):
            content = read_file(content, source.identify(number))
        elif content is None:
            content = encode_png(source.read(number)).numpy().tobytes()
    except BadImage as error:
        say(f"{error.name} is left out: {error.reason}.")
        return
    target = folder / f"{int(source.labels[number]):04d}" / f"{number:07d}.{_extension(content)}"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)


def _extension(content: bytes) -> str:
    """Return an extension under which the image is found; it is decoded by its content."""
    try:
        name = (Image.open(io.BytesIO(content)).format or "").lower()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # trainings skip and count it
        name = ""
    return name if name in IMAGE_EXTENSIONS else "png"
