"""A source's contents in a few lines: images, classes, objects, masks, sizes, and what was left out.

A run reads the headers of a bounded sample of images before it starts (`sample_census`); `pecobook check` reads every
image. Both fill a `Census`, which takes the same memory for any number of images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import numpy as np

from pecobook.data.decode import BadImage, check_regular, open_image
from pecobook.data.dense.detection import DetectionSource
from pecobook.data.dense.segmentation import SegmentationSource
from pecobook.data.dense.segmentation_classes import MaskClasses, pixels_per_class, pixels_per_value
from pecobook.data.dense.segmentation_pairs import masks_among_classes, names_masks
from pecobook.data.source import ImageSource, Splits

SAMPLE_IMAGES = 256
SAMPLE_MASKS = 64
_SAMPLE_SECONDS = 2.0  # on a slow disk the sample ends here
_LISTED_CLASSES = 6
_FEW_IMAGES = 20_000  # file names are compared for up to this many images
Lines = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Look:
    """The facts about one image, from its header, or from the whole image if it was decoded.

    Attributes:
        name: the image's name.
        size: height and width in pixels; None if unknown.
        mode: mode of the file, such as "RGB", "L" (grey) or "P" (palette); empty if unknown.
        digest: 64 bits that are equal for equal files; None if the file was not read.
        values: value of the mask's pixels, as the file has it -> number of pixels; None without a mask that was read.
        problem: why the image, or its mask, cannot be used.
    """

    name: str
    size: tuple[int, int] | None = None
    mode: str = ""
    digest: int | None = None
    values: dict[int, int] | None = None
    problem: BadImage | None = None


def look(source: ImageSource, index: int, *, whole: bool, mask: bool = True) -> Look:
    """Inspect image `index`.

    Args:
        source: the source of the image.
        index: number of the image.
        whole: decode the image, and hash its file; False reads only the header.
        mask: also read the mask, if the source has masks whose pixels are not yet counted.
    """
    name, size, mode, digest, values = source.identify(index), None, "", None, None
    try:
        file = source.file(index)
        if isinstance(file, Path):
            check_regular(file.stat(), name)  # opening a named pipe would block forever
        if whole or file is None:
            image = source.read(index)
            size = (int(image.shape[1]), int(image.shape[2]))
        if whole:
            if source.unit == "clips":  # others may have its middle frame too
                data = b"".join(map(_digest, source.subset([index]).files() or ()))
            else:
                data = file.read_bytes() if isinstance(file, Path) else file or image.numpy().tobytes()
            digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
        if file is not None:
            header_size, mode = _header(name, file)
            size = size or header_size
        if isinstance(source, SegmentationSource) and mask and source.counts is None:
            values = _pixels_per_value(source, index)
    except BadImage as error:
        return Look(name, size, mode, digest, problem=error)
    except OSError as error:  # the file vanished or cannot be read any longer
        return Look(name, size, mode, digest, problem=BadImage(name, error.strerror or str(error)))
    return Look(name, size, mode, digest, values)


def _digest(path: bytes) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123 (bytes)
        return hashlib.file_digest(file, "blake2b").digest()


def _pixels_per_value(source: SegmentationSource, index: int) -> dict[int, int]:
    """Return the number of pixels of each value of a mask. Raises BadImage, also if the mask's size is wrong."""
    values, (height, width) = source.read_values(index)
    if values.shape != (height, width):
        text = f"is {values.shape[1]} x {values.shape[0]}, but its image is {width} x {height}"
        raise BadImage(source.identify_mask(index), text)
    return pixels_per_value(values)


def _header(name: str, file: Path | bytes) -> tuple[tuple[int, int], str]:
    """Return height and width as the file states them, and the mode. Raises BadImage."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_image(io.BytesIO(file) if isinstance(file, bytes) else file, name=name) as image:
                return (image.height, image.width), image.mode
    except BadImage:
        raise
    except Exception as error:  # a header of arbitrary bytes may raise any exception
        raise BadImage(name, "not an image, or an unsupported format") from error


@dataclasses.dataclass
class Census:
    """What was found in the inspected images of one split."""

    images: int = 0
    num_bad: int = 0
    bad: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Reason -> names of the first images that cannot be read for this reason."""
    modes: Counter[str] = dataclasses.field(default_factory=Counter)
    smallest: tuple[int, int] | None = None
    """Shortest short side and shortest long side."""
    largest: tuple[int, int] = (0, 0)
    """Longest short side and longest long side."""
    size: tuple[int, int] | None = None
    """Height and width of the first image."""
    masks: int = 0
    values: Counter[int] = dataclasses.field(default_factory=Counter)
    """Value of the masks' pixels -> number of pixels."""
    masks_with: Counter[int] = dataclasses.field(default_factory=Counter)
    """Value -> number of masks that hold it."""

    @classmethod
    def of(cls, source: ImageSource) -> Census:
        """Return a census without images, but with the pixels of all masks if these are already counted."""
        counts = source.counts if isinstance(source, SegmentationSource) else None
        return cls() if counts is None else cls(masks=counts.masks, values=Counter(counts.values))

    def add(self, seen: Look, *, keep: int = 20) -> None:
        """Count one image; about `keep` unreadable ones are kept by name, grouped by reason."""
        self.images += 1
        if seen.problem:
            self.num_bad += 1
            alike = self.bad.get(seen.problem.reason, [])
            if len(self.bad if not alike else self.names_of_bad()) < keep:
                self.bad[seen.problem.reason] = [*alike, seen.problem.name]
            return
        if seen.mode:
            self.modes[seen.mode] += 1
        if seen.size is not None:
            sides = min(seen.size), max(seen.size)
            self.size = self.size or seen.size
            low = self.smallest or sides
            self.smallest = min(low[0], sides[0]), min(low[1], sides[1])
            self.largest = max(self.largest[0], sides[0]), max(self.largest[1], sides[1])
        if seen.values is not None:
            self.masks += 1
            self.values.update(seen.values)
            self.masks_with.update(seen.values.keys())

    def names_of_bad(self) -> list[str]:
        """Return the names of the unreadable images that were kept."""
        return [name for names in self.bad.values() for name in names]


def sample_census(source: ImageSource, *, count: int = SAMPLE_IMAGES, seconds: float = _SAMPLE_SECONDS) -> Census:
    """Read the headers of at most `count` evenly spaced images, and some of their masks, for a few seconds."""
    census, began = Census.of(source), time.monotonic()
    spaced = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(np.int64))
    shuffled = np.random.default_rng(0).permutation(spaced)  # so that a sample that ends early is spread evenly too
    for number, index in enumerate(shuffled.tolist()):
        census.add(look(source, index, whole=False, mask=number < SAMPLE_MASKS))
        if time.monotonic() - began > seconds:
            break
    return census


def class_counts(source: ImageSource) -> dict[str, int] | None:
    """Return the number of images of each class (of objects in a detection source), or None without labels."""
    if isinstance(source, DetectionSource):
        return source.objects_per_class()
    if source.labels is None:
        return None
    counts = np.bincount(source.labels, minlength=len(source.classes or ()))
    return dict(zip(source.classes or (), counts.tolist(), strict=True))


# ------------------------------------------------------------------------------------------------------------ as text


def describe(splits: Splits, census: Census | None = None, *, evaluation: Census | None = None) -> Lines:
    """Return (topic, text) lines that say what a run learns from.

    Args:
        splits: the opened source.
        census: what was found in the training images; None inspects a sample of them.
        evaluation: what was found in the held-out images; None inspects none of them.
    """
    train, held_out = splits.train, splits.evaluation
    census = sample_census(train) if census is None else census
    evaluation = Census.of(held_out) if evaluation is None else evaluation
    built_in = ", built-in photographs (--data SOURCE takes your own images)" if train.name == "photos" else ""
    amounts = f"{len(train):,} {train.unit} to train on, {len(held_out):,} held out ({splits.evaluation_name})"
    lines = [("data", f"{train.name}{built_in}"), (train.unit, amounts)]
    if isinstance(train, DetectionSource):
        lines += _object_lines(train, cast("DetectionSource", held_out))
    elif isinstance(train, SegmentationSource):
        lines += _pixel_lines(train, census, evaluation)
    else:
        lines += [("classes", _labels_text(train, held_out))]
    if left_out := left_out_of(splits):
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        lines.append(("left out", f"{left_out.total():,}: {reasons}"))
    lines.append(("sizes", sizes_text(census, len(train), train.unit)))
    if train.value_range is not None:
        lines.append(("range", f"{train.value_range} becomes 0..255 in images with more than 8 bits"))
    if census.num_bad:
        reason, names = next(iter(census.bad.items()))
        lines.append(("unreadable", f"{census.num_bad:,} of {census.images:,}, the first: {names[0]}: {reason}"))
    notes = [*splits.notes, *_masks_that_are_learned(train)]
    return [*lines, *(("note", note) for note in notes)]


def _masks_that_are_learned(source: ImageSource) -> list[str]:
    """Return a note if one of a few class folders seems to contain the masks of the others."""
    classes = source.classes or ()
    if source.labels is None or len(classes) > 4 or len(source) > _FEW_IMAGES or not any(map(names_masks, classes)):
        return []
    files: dict[str, list[str]] = {name: [] for name in classes}
    for index, label in enumerate(source.labels.tolist()):
        files[classes[label]].append(source.identify(index))
    name = masks_among_classes(files)
    text = f"The class '{name}' has files of the names of other classes' files: if it holds masks, move it away."
    return [text] if name else []


def left_out_of(splits: Splits) -> Counter[str]:
    """Return how many files, pairs and objects of a source are not used, by reason."""
    counts = Counter(splits.left_out)
    counts.update(splits.train.left_out)
    counts.update(splits.evaluation.left_out)
    return counts


def aligned(lines: Iterable[tuple[str, str]]) -> list[str]:
    """Return one text for each (topic, text), with aligned columns."""
    return [f"{topic:<10} {text}" for topic, text in lines]


def _labels_text(train: ImageSource, held_out: ImageSource) -> str:
    counts, held_counts = class_counts(train), class_counts(held_out)
    if counts is None:
        return "no labels"
    text = f"{len(counts):,} {'classes' if len(counts) != 1 else 'class'}: {spread(counts)}"
    return f"{text}; held out: {'no labels' if held_counts is None else spread(held_counts)}"


def _object_lines(train: DetectionSource, held_out: DetectionSource) -> Lines:
    lines = [("classes", f"{len(train.classes):,}, {'boxes and masks' if train.has_masks else 'boxes without masks'}")]
    for topic, source in (("objects", train), ("held out", held_out)):
        counts = source.objects_per_class()
        images = f"{len(source) - source.num_empty:,} of {len(source):,} images"
        lines.append((topic, f"{sum(counts.values()):,} on {images}: {spread(counts)}"))
    return lines


def _pixel_lines(train: SegmentationSource, census: Census, evaluation: Census) -> Lines:
    lines = [("classes", f"{len(train.mask_classes.names):,} of masks")]
    for topic, part in (("pixels", census), ("held out", evaluation)):
        if part.masks:
            sampled = f" ({part.masks:,} masks looked at)" if part is census and part.masks < len(train) else ""
            lines.append((topic, pixels_text(train.mask_classes, part.values) + sampled))
    return lines


def pixels_text(classes: MaskClasses, values: Mapping[int, int]) -> str:
    """Return the share of the pixels of each class, as `spread` does, and of the pixels of no class.

    Args:
        classes: the meaning of the pixels.
        values: value of a pixel -> number of pixels.
    """
    counts = pixels_per_class(classes, values)
    total, everything = max(sum(counts.values()), 1), max(sum(values.values()), 1)
    percent = {name: f"{short(name)} {_percent(count / total)}" for name, count in counts.items()}
    text = ", ".join(percent.values())
    if len(counts) > _LISTED_CLASSES and any(counts.values()):
        rarest, commonest, absent = _extremes(counts)
        text = f"from {percent[rarest]} to {percent[commonest]}{absent}"
    ignored = sum(values.get(value, 0) for value in classes.ignored)
    return text + (f"; {_percent(ignored / everything)} of all are ignored" if ignored else "")


def spread(counts: Mapping[str, int]) -> str:
    """Return all counts of a few classes, or the rarest and the commonest class of many, and the classes without any.

    Args:
        counts: name of a class -> number.
    """
    if len(counts) <= _LISTED_CLASSES:
        return ", ".join(f"{short(name)} {count:,}" for name, count in counts.items())
    if not any(counts.values()):
        return "none"
    rarest, commonest, absent = _extremes(counts)
    if counts[rarest] == counts[commonest]:
        return f"{counts[rarest]:,} each{absent}"
    return f"from {counts[rarest]:,} ({short(rarest)}) to {counts[commonest]:,} ({short(commonest)}){absent}"


def _extremes(counts: Mapping[str, int]) -> tuple[str, str, str]:
    """Return the rarest and the most common class that occur, and a text on those that do not."""
    present = [name for name, count in counts.items() if count]
    absent = [short(name) for name, count in counts.items() if not count]
    more = f" and {len(absent) - 3:,} more" if len(absent) > 3 else ""
    words = f", none of {', '.join(absent[:3])}{more}" if absent else ""
    return min(present, key=counts.__getitem__), max(present, key=counts.__getitem__), words


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share == 0 or share >= 0.0005 else "< 0.1%"


def sizes_text(census: Census, total: int, unit: str = "images") -> str:
    """Return the sizes and modes found, and in how many of `total` images."""
    if census.smallest is None or census.size is None:
        return "unknown"
    (low_short, low_long), (high_short, high_long) = census.smallest, census.largest
    if census.smallest == census.largest:
        sizes = f"{census.size[1]:,} x {census.size[0]:,} pixels"
    else:
        sizes = f"short side {_range(low_short, high_short)}, long side {_range(low_long, high_long)} pixels"
    modes = ", ".join(f"{mode} {count:,}" for mode, count in census.modes.most_common())
    modes = next(iter(census.modes), "") if len(census.modes) == 1 else modes
    sampled = f" ({census.images:,} {unit} looked at)" if census.images < total else ""
    return sizes + (f"; mode {modes}" if modes else "") + sampled


def _range(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def short(name: str) -> str:
    """Return a name of at most 24 characters."""
    return name if len(name) <= 24 else f"{name[:21]}..."
