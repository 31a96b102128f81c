"""Reads a file of annotations in COCO's format, checks it, and packs it into arrays.

All problems are collected as text, so that the user sees them together. Objects are stored as arrays and one buffer of
bytes, which forked workers share instead of copying: COCO's training set has 860,000 objects.

A mask keeps the form that it has in the file (polygons, or run lengths, compressed or not) until it is decoded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pecobook.data.decode import BadImage, decode, header_size
from pecobook.data.dense.coco_masks import (
    check_segment,
    encode_segment,
    format_size,
    is_integer,
    parse_box,
    segment_area,
)
from pecobook.data.source import Integers
from pecobook.errors import first_line
from pecobook.utils.numbers import is_number

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass
class Findings:
    """Problems found while reading, as lines for the user."""

    fatal: list[str] = dataclasses.field(default_factory=list)
    """Files that cannot be used at all."""
    problems: list[str] = dataclasses.field(default_factory=list)
    """Images and objects that cannot be used."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """Corrections that were made."""


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


@dataclasses.dataclass(frozen=True, eq=False)
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

    def __len__(self) -> int:
        return len(self.image_ids)

    def read(self, row: int) -> Tensor:
        """Read and decode the image of a row: uint8 (3, H, W). Raises BadImage."""
        path = self.root / str(self.names[row])
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadImage(str(path), error.strerror or str(error)) from error
        image = decode(data, name=str(path))
        if image.shape[1:] != tuple(self.sizes[row]):
            raise BadImage(
                str(path), f"{format_size(image.shape[1:])}, not {format_size(self.sizes[row])} as in its annotations"
            )
        return image

    def identify(self, row: int) -> str:
        """Return the path of the image of a row."""
        return str(self.root / str(self.names[row]))

    def digest(self, rows: Integers) -> str:
        """Return a hash of the images' names and of all objects."""
        digest = hashlib.sha256("\0".join(self.names[rows].tolist()).encode())
        for array in (self.starts, self.boxes, self.categories, self.crowd):
            digest.update(array.tobytes())
        if self.segments is not None:
            digest.update(self.segments.buffer.tobytes())
        return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- reading


def read_annotations(file: Path, root: Path, findings: Findings, *, masks: bool) -> Annotations | None:
    """Read a file of annotations; return None if the file cannot be used at all.

    Args:
        file: JSON in COCO's format.
        root: folder of the images.
        findings: problems are added here. An image or object with a problem is left out of the result.
        masks: whether to read masks; if False, masks are not checked.
    """
    try:
        content = json.loads(file.read_bytes())
        images, objects, categories = _tables(content)
        names = _category_names(categories)
    except RecursionError:
        findings.fatal.append(f"{file}: is nested too deeply for annotations.")
    except (OSError, ValueError) as error:  # JSON and Unicode errors are ValueErrors
        prefix = "is not valid JSON, perhaps truncated: " if isinstance(error, json.JSONDecodeError) else ""
        findings.fatal.append(f"{file}: {prefix}{first_line(error)}.")
    else:
        return _Reader(file, root, findings, names).read(images, objects, masks=masks)
    return None


def _tables(content: Any) -> tuple[list[Any], list[Any], list[Any]]:
    if not isinstance(content, dict):
        raise ValueError("holds no JSON object with images, annotations and categories")
    missing = [name for name in ("images", "annotations", "categories") if not isinstance(content.get(name), list)]
    if missing:
        raise ValueError(f"has no list '{missing[0]}', which COCO's format requires")
    return content["images"], content["annotations"], content["categories"]


def _category_names(categories: list[Any]) -> dict[int, str]:
    names: dict[int, str] = {}
    for category in categories:
        number = category.get("id") if isinstance(category, dict) else None
        if not is_integer(number) or "name" not in category:
            raise ValueError(f"category {json.dumps(category)[:60]} has no integer 'id' or no 'name'")
        if number in names or str(category["name"]) in names.values():
            raise ValueError(f"category {number} ('{category['name']}') has the id or the name of another category")
        names[number] = str(category["name"])
    if not names:
        raise ValueError("has no category")
    return dict(sorted(names.items()))


class _Reader:
    """Checks one file; an image or object with a problem is reported in the findings and left out."""

    def __init__(self, file: Path, root: Path, findings: Findings, names: dict[int, str]) -> None:
        self.file, self.root, self.findings, self.names = file, root, findings, names
        self.listings: dict[Path, set[str]] = {}
        self.num_clipped = 0
        self.left_out: Counter[str] = Counter()

    def read(self, images: list[Any], objects: list[Any], *, masks: bool) -> Annotations:
        sizes: dict[int, tuple[int, int]] = {}
        files: dict[int, str] = {}
        listed_ids: set[int] = set()
        for image in images:
            image_id = image.get("id") if isinstance(image, dict) else None
            if not is_integer(image_id):
                self._add_problem(f"image {json.dumps(image)[:60]}", "has no integer 'id'")
                self.left_out["images that cannot be used"] += 1
                continue
            try:
                sizes[image_id] = self._image_size(image, image_id in listed_ids)
                files[image_id] = image["file_name"]
            except ValueError as error:
                self._add_problem(f"image {image_id}", str(error))
                self.left_out["images that cannot be used"] += 1
            listed_ids.add(image_id)
        masks = masks and any(isinstance(entry, dict) and entry.get("segmentation") for entry in objects)
        objects_of: dict[int, list[_Object]] = {image_id: [] for image_id in sizes}
        for entry in objects:
            try:
                checked = self._check_object(entry, listed_ids, sizes, masks)
            except ValueError as error:
                entry_id = entry.get("id", "?") if isinstance(entry, dict) else json.dumps(entry)[:60]
                self._add_problem(f"annotation {entry_id}", str(error))
                self.left_out["objects that cannot be used"] += 1
            else:
                if checked is not None:
                    objects_of[entry["image_id"]].append(checked)
        self._note_corrections()
        return self._pack(files, sizes, objects_of, masks)

    def _add_problem(self, subject: str, text: str) -> None:
        self.findings.problems.append(f"{self.file}: {subject} {text}.")

    def _note_corrections(self) -> None:
        for count, text in (
            (self.left_out["objects without area"], "left out: no area"),
            (self.num_clipped, "clipped at the edge of the image"),
        ):
            if count:
                self.findings.notes.append(f"{self.file}: {count} object{'s' if count > 1 else ''} {text}.")

    def _image_size(self, image: dict[str, Any], is_repeated: bool) -> tuple[int, int]:
        """Return height and width. Raises ValueError if the image cannot be used."""
        if is_repeated:
            raise ValueError("is listed twice")
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError("has no 'file_name'")
        path = self.root / name
        if path.name not in self._listing(path.parent):
            raise ValueError(f"'{name}' is not in {self.root}")
        stated = image.get("height"), image.get("width")
        actual = header_size(path)
        if actual is None:  # training later skips the image, like every image that cannot be read
            if not all(is_integer(side) and side > 0 for side in stated):
                raise ValueError(f"'{name}' cannot be read, and the annotations state no size")
            return stated  # type: ignore[return-value]
        if stated not in (actual, (None, None)):
            raise ValueError(
                f"'{name}' is {format_size(actual)} pixels, but the annotations state {format_size(stated)}"
            )
        return actual

    def _listing(self, folder: Path) -> set[str]:
        if folder not in self.listings:
            self.listings[folder] = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        return self.listings[folder]

    def _check_object(
        self, entry: Any, image_ids: set[int], sizes: dict[int, tuple[int, int]], masks: bool
    ) -> _Object | None:
        """Check one entry of the annotations.

        Args:
            entry: the entry of the file.
            image_ids: ids of all images of the file.
            sizes: height and width of the usable images, by id.
            masks: whether to read the mask.

        Returns:
            the object; None if the object has no area, or if its image cannot be used.

        Raises:
            ValueError: the object cannot be used.
        """
        if not isinstance(entry, dict):
            raise ValueError("is not a JSON object")
        image_id, category = entry.get("image_id"), entry.get("category_id")
        if not is_integer(image_id) or image_id not in image_ids:
            raise ValueError(f"refers to image {image_id}, which does not exist")
        if not is_integer(category) or category not in self.names:
            raise ValueError(f"refers to category {category}, which does not exist")
        if image_id not in sizes:  # the image itself is already reported
            self.left_out["objects of images that cannot be used"] += 1
            return None
        height, width = sizes[image_id]
        segment = entry.get("segmentation") if masks else None
        is_inside = check_segment(segment, height, width) if masks else True
        box = parse_box(entry.get("bbox"), segment, height, width)
        x, y, w, h = box
        if w <= 0 or h <= 0:
            self.left_out["objects without area"] += 1
            return None
        if x >= width or y >= height or x + w <= 0 or y + h <= 0:
            raise ValueError(f"has a box outside the {format_size((height, width))} pixels of its image")
        # Coordinates written with two decimals may exceed the edge by 0.01.
        self.num_clipped += not is_inside or x < -0.01 or y < -0.01 or x + w > width + 0.01 or y + h > height + 0.01
        area = entry.get("area")
        if not is_number(area):
            area = segment_area(segment, height, width) if masks else w * h
        return _Object(
            box, category, bool(entry.get("iscrowd", 0)), float(area), encode_segment(segment) if masks else None
        )

    def _pack(
        self,
        files: dict[int, str],
        sizes: dict[int, tuple[int, int]],
        objects_of: dict[int, list[_Object]],
        masks: bool,
    ) -> Annotations:
        objects = [item for row in objects_of.values() for item in row]
        counts = [len(row) for row in objects_of.values()]
        self.left_out["crowds (iscrowd 1)"] = sum(item.crowd for item in objects)
        return Annotations(
            root=self.root,
            names=np.array(list(files.values()), dtype=np.str_),
            image_ids=np.array(list(sizes), dtype=np.int64),
            sizes=np.array(list(sizes.values()), dtype=np.int64).reshape(-1, 2),
            starts=np.cumsum([0, *counts], dtype=np.int64),
            boxes=np.array([item.box for item in objects], dtype=np.float64).reshape(-1, 4),
            categories=np.array([item.category for item in objects], dtype=np.int64),
            crowd=np.array([item.crowd for item in objects], dtype=np.bool_),
            areas=np.array([item.area for item in objects], dtype=np.float64),
            segments=PackedBytes([item.segment or b"" for item in objects]) if masks else None,
            category_names=self.names,
            left_out={reason: count for reason, count in self.left_out.items() if count},
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Object:
    box: tuple[float, float, float, float]
    category: int
    crowd: bool
    area: float
    segment: bytes | None
