"""One file of annotations in COCO's format, read whole, checked, and packed into arrays.

Everything that is wrong is gathered as text, so that its user sees all of it at once. Objects are kept as arrays and
one buffer of bytes, which forked workers share instead of copying: COCO's training set has 860,000 of them.

A mask stays as it is written (polygons, or run lengths, compressed or not) until it is asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pecobook.data.decode import BadImage, decode, header_size
from pecobook.data.dense.coco_masks import (
    check_segment,
    encode,
    find_box,
    is_number,
    is_whole,
    segment_area,
    shape_text,
)
from pecobook.data.source import Integers
from pecobook.errors import first_line

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass
class Findings:
    """What was found on the way, as lines for the user."""

    fatal: list[str] = dataclasses.field(default_factory=list)
    """Whole files that cannot be used."""
    problems: list[str] = dataclasses.field(default_factory=list)
    """Images and objects that cannot be used."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What was mended."""


class Packed:
    """Byte strings in one buffer."""

    def __init__(self, items: Sequence[bytes]) -> None:
        self.ends = np.cumsum([len(item) for item in items], dtype=np.int64)
        self.buffer = np.frombuffer(b"".join(items), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> bytes:
        start = int(self.ends[number - 1]) if number else 0
        return self.buffer[start : int(self.ends[number])].tobytes()


@dataclasses.dataclass(frozen=True, eq=False)
class Annotations:
    """Images (rows) and objects of one file; the objects of row r are numbers starts[r] to starts[r + 1]."""

    root: Path
    """Folder of the images."""
    names: npt.NDArray[np.str_]
    """Paths of the images in it, (R,)."""
    image_ids: Integers
    """(R,)"""
    sizes: Integers
    """Height and width of each image, (R, 2)."""
    starts: Integers
    """(R + 1,)"""
    boxes: Floats
    """x, y, width, height of each object in pixels, as written: (A, 4)."""
    categories: Integers
    """Category id of each object, (A,)."""
    crowd: npt.NDArray[np.bool_]
    """Whether it is a crowd: many objects under one mask, which are neither learned nor counted. (A,)"""
    areas: Floats
    """Of each object in pixels, (A,)."""
    segments: Packed | None
    """The mask of each object as JSON; None where no object has one."""
    category_names: dict[int, str]
    """By category id, in order."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def read(self, row: int) -> Tensor:
        """The image, uint8 (3, H, W). Raises BadImage."""
        path = self.root / str(self.names[row])
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadImage(str(path), error.strerror or str(error)) from error
        image = decode(data, name=str(path))
        if image.shape[1:] != tuple(self.sizes[row]):
            raise BadImage(
                str(path), f"{shape_text(image.shape[1:])}, not the {shape_text(self.sizes[row])} of its annotations"
            )
        return image

    def identify(self, row: int) -> str:
        """The path of an image."""
        return str(self.root / str(self.names[row]))

    def digest(self, rows: Integers) -> str:
        """A hash of the images' names and of all objects."""
        digest = hashlib.sha256("\0".join(self.names[rows].tolist()).encode())
        for part in (self.starts, self.boxes, self.categories, self.crowd):
            digest.update(part.tobytes())
        if self.segments is not None:
            digest.update(self.segments.buffer.tobytes())
        return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- reading


def read_annotations(file: Path, root: Path, findings: Findings, *, masks: bool) -> Annotations | None:
    """Read a file of annotations; None when the whole file cannot be used.

    Args:
        file: JSON in COCO's format.
        root: folder of its images.
        findings: gets what is wrong. What is wrong with one image or object leaves that out.
        masks: whether masks are wanted; without, nothing is asked of them.
    """
    try:
        content = json.loads(file.read_bytes())
        images, objects, categories = _tables(content)
        names = _category_names(categories)
    except RecursionError:
        findings.fatal.append(f"{file}: is nested too deeply to be annotations.")
    except (OSError, ValueError) as error:  # JSON and Unicode errors are ValueErrors
        kind = "is no valid JSON, perhaps cut short: " if isinstance(error, json.JSONDecodeError) else ""
        findings.fatal.append(f"{file}: {kind}{first_line(error)}.")
    else:
        return _Reader(file, root, findings, names).read(images, objects, masks=masks)
    return None


def _tables(content: Any) -> tuple[list[Any], list[Any], list[Any]]:
    if not isinstance(content, dict):
        raise ValueError("holds no JSON object with images, annotations and categories")
    missing = [name for name in ("images", "annotations", "categories") if not isinstance(content.get(name), list)]
    if missing:
        raise ValueError(f"has no list '{missing[0]}', as COCO's format wants")
    return content["images"], content["annotations"], content["categories"]


def _category_names(categories: list[Any]) -> dict[int, str]:
    names: dict[int, str] = {}
    for category in categories:
        number = category.get("id") if isinstance(category, dict) else None
        if not is_whole(number) or "name" not in category:
            raise ValueError(f"category {json.dumps(category)[:60]} has no whole number 'id' or no 'name'")
        if number in names or str(category["name"]) in names.values():
            raise ValueError(f"category {number} ('{category['name']}') stands there twice, by its id or its name")
        names[number] = str(category["name"])
    if not names:
        raise ValueError("has no category")
    return dict(sorted(names.items()))


class _Reader:
    """Checks of one file; what is wrong with an image or an object is noted and that left out."""

    def __init__(self, file: Path, root: Path, findings: Findings, names: dict[int, str]) -> None:
        self.file, self.root, self.findings, self.names = file, root, findings, names
        self.listings: dict[Path, set[str]] = {}
        self.flat = self.cut = 0

    def read(self, images: list[Any], objects: list[Any], *, masks: bool) -> Annotations:
        sizes: dict[int, tuple[int, int]] = {}
        files: dict[int, str] = {}
        known: set[int] = set()
        for image in images:
            number = image.get("id") if isinstance(image, dict) else None
            if not is_whole(number):
                self._problem(f"image {json.dumps(image)[:60]}", "has no whole number 'id'")
                continue
            try:
                sizes[number] = self._image_size(image, number in known)
                files[number] = image["file_name"]
            except ValueError as error:
                self._problem(f"image {number}", str(error))
            known.add(number)
        masks = masks and any(isinstance(one, dict) and one.get("segmentation") for one in objects)
        of_image: dict[int, list[_Object]] = {number: [] for number in sizes}
        for one in objects:
            try:
                found = self._object(one, known, sizes, masks)
            except ValueError as error:
                number = one.get("id", "?") if isinstance(one, dict) else json.dumps(one)[:60]
                self._problem(f"annotation {number}", str(error))
            else:
                if found is not None:
                    of_image[one["image_id"]].append(found)
        self._note_repairs()
        return self._pack(files, sizes, of_image, masks)

    def _problem(self, what: str, text: str) -> None:
        self.findings.problems.append(f"{self.file}: {what} {text}.")

    def _note_repairs(self) -> None:
        for count, what in ((self.flat, "left out: no area"), (self.cut, "cut at the edge of the image")):
            if count:
                self.findings.notes.append(f"{self.file}: {count} object{'s' if count > 1 else ''} {what}.")

    def _image_size(self, image: dict[str, Any], twice: bool) -> tuple[int, int]:
        """Height and width. Raises ValueError when the image cannot be used."""
        if twice:
            raise ValueError("stands there twice")
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError("has no 'file_name'")
        path = self.root / name
        if path.name not in self._listing(path.parent):
            raise ValueError(f"'{name}' is not in {self.root}")
        stated = image.get("height"), image.get("width")
        actual = header_size(path)
        if actual is None:  # skipped when its turn comes, as every image that cannot be read
            if not all(is_whole(side) and side > 0 for side in stated):
                raise ValueError(f"'{name}' cannot be read, and no size is stated")
            return stated  # type: ignore[return-value]
        if stated not in (actual, (None, None)):
            raise ValueError(f"'{name}' is {shape_text(actual)} pixels, but stated as {shape_text(stated)}")
        return actual

    def _listing(self, folder: Path) -> set[str]:
        if folder not in self.listings:
            self.listings[folder] = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        return self.listings[folder]

    def _object(self, one: Any, known: set[int], sizes: dict[int, tuple[int, int]], masks: bool) -> _Object | None:
        """The object; None when it has no area, or no image. Raises ValueError when it cannot be used."""
        if not isinstance(one, dict):
            raise ValueError("is no JSON object")
        image, category = one.get("image_id"), one.get("category_id")
        if not is_whole(image) or image not in known:
            raise ValueError(f"is of image {image}, which is not there")
        if not is_whole(category) or category not in self.names:
            raise ValueError(f"is of category {category}, which is not there")
        if image not in sizes:  # said of the image already
            return None
        height, width = sizes[image]
        segment = one.get("segmentation") if masks else None
        inside = check_segment(segment, height, width) if masks else True
        box = find_box(one.get("bbox"), segment, height, width)
        x, y, w, h = box
        if w <= 0 or h <= 0:
            self.flat += 1
            return None
        if x >= width or y >= height or x + w <= 0 or y + h <= 0:
            raise ValueError(f"has a box outside the {shape_text((height, width))} pixels of its image")
        # Sides written with two decimals may miss the edge by as much.
        self.cut += not inside or x < -0.01 or y < -0.01 or x + w > width + 0.01 or y + h > height + 0.01
        area = one.get("area")
        if not is_number(area):
            area = segment_area(segment, height, width) if masks else w * h
        return _Object(box, category, bool(one.get("iscrowd", 0)), float(area), encode(segment) if masks else None)

    def _pack(
        self,
        files: dict[int, str],
        sizes: dict[int, tuple[int, int]],
        of_image: dict[int, list[_Object]],
        masks: bool,
    ) -> Annotations:
        objects = [one for row in of_image.values() for one in row]
        counts = [len(row) for row in of_image.values()]
        return Annotations(
            root=self.root,
            names=np.array(list(files.values()), dtype=np.str_),
            image_ids=np.array(list(sizes), dtype=np.int64),
            sizes=np.array(list(sizes.values()), dtype=np.int64).reshape(-1, 2),
            starts=np.cumsum([0, *counts], dtype=np.int64),
            boxes=np.array([one.box for one in objects], dtype=np.float64).reshape(-1, 4),
            categories=np.array([one.category for one in objects], dtype=np.int64),
            crowd=np.array([one.crowd for one in objects], dtype=np.bool_),
            areas=np.array([one.area for one in objects], dtype=np.float64),
            segments=Packed([one.segment or b"" for one in objects]) if masks else None,
            category_names=self.names,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Object:
    box: tuple[float, float, float, float]
    category: int
    crowd: bool
    area: float
    segment: bytes | None
