"""Reads an annotation file in COCO's format, checks it, and packs it into arrays.

All problems are collected as text, so that the user sees them together.
"""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pecobook.data.decode import header_size
from pecobook.data.dense.coco_annotations import Annotations
from pecobook.data.dense.coco_check import SHARES, UNKNOWN, are_in_corner, compare_boxes, diagnose_boxes
from pecobook.data.dense.coco_files import ImageFiles, file_name
from pecobook.data.dense.coco_values import (
    OUTSIDE,
    UnusableError,
    as_flag,
    as_integer,
    as_number,
    clean_segment,
    encode_segment,
    format_size,
    mask_box,
    parse_box,
    read_categories,
    segment_area,
)
from pecobook.data.source import Note
from pecobook.errors import first_line

ON_CROWDS = (
    "A crowd is many objects under one mask, which training ignores: set iscrowd to 0 where it is one object, "
    "as for the masks that CVAT draws by brush."
)


@dataclasses.dataclass
class Findings:
    """Problems found while reading, as lines for the user."""

    fatal: list[str] = dataclasses.field(default_factory=list)
    """Files that cannot be used at all."""
    problems: list[str] = dataclasses.field(default_factory=list)
    """Images and objects that cannot be used."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """Corrections that were made."""


def read_annotations(file: Path, folders: Sequence[Path], findings: Findings, *, masks: bool) -> Annotations | None:
    """Read an annotation file; return None if the file cannot be used at all.

    Args:
        file: JSON in COCO's format.
        folders: folders that may contain the images; the one that contains most of them is used.
        findings: problems are added here. An image or object with a problem is left out of the result.
        masks: whether to read masks; if False, masks are not checked.
    """
    try:
        content = json.loads(file.read_bytes())
        images, objects, categories = _tables(content)
        used = {as_integer(entry.get("category_id")) for entry in objects if isinstance(entry, dict)}
        names, notes = read_categories(categories, used - {None})  # type: ignore[arg-type]
    except RecursionError:
        findings.fatal.append(f"{file}: is nested too deeply for annotations.")
    except (OSError, ValueError) as error:  # JSON and Unicode errors are ValueErrors
        prefix = "is not valid JSON, perhaps truncated: " if isinstance(error, json.JSONDecodeError) else ""
        findings.fatal.append(f"{file}: {prefix}{first_line(error)}.")
    else:
        findings.notes += [f"{file}: {note}." for note in notes]
        return _Reader(file, ImageFiles(file, folders, images), findings, names).read(images, objects, masks=masks)
    return None


def _tables(content: Any) -> tuple[list[Any], list[Any], list[Any]]:
    if not isinstance(content, dict):
        raise ValueError(
            "holds no JSON object with images, annotations and categories (Label Studio also exports COCO)"
        )
    missing = [name for name in ("images", "annotations", "categories") if not isinstance(content.get(name), list)]
    if missing:
        raise ValueError(f"has no list '{missing[0]}', which COCO's format requires")
    return content["images"], content["annotations"], content["categories"]


class _Reader:
    """Checks one file; an image or object with a problem is reported in the findings and left out."""

    def __init__(self, file: Path, files: ImageFiles, findings: Findings, names: dict[int, str]) -> None:
        self.file, self.files, self.findings, self.names = file, files, findings, names
        self.left_out: Counter[str] = Counter()
        self.num_clipped = self.num_parts = 0
        self.boxes = array("d")  # x, y, width and height of every object, and height and width of its image

    def read(self, images: list[Any], objects: list[Any], *, masks: bool) -> Annotations:
        sizes: dict[int, tuple[int, int]] = {}
        paths: dict[int, str] = {}
        listed_ids: set[int] = set()
        for image in images:
            image_id = as_integer(image.get("id")) if isinstance(image, dict) else None
            if image_id is None:
                unusable = UnusableError("has no integer 'id'", "images that cannot be used")
                self._add_problem(f"image {json.dumps(image)[:60]}", unusable)
                continue
            try:
                path, size = self._check_image(image, image_id in listed_ids)
                sizes[image_id], paths[image_id] = size, path
            except UnusableError as error:
                self._add_problem(f"image {image_id}", error)
            listed_ids.add(image_id)
        masks = masks and any(isinstance(entry, dict) and entry.get("segmentation") for entry in objects)
        objects_of: dict[int, list[_Object]] = {image_id: [] for image_id in sizes}
        for entry in objects:
            try:
                image_id, checked = self._check_object(entry, listed_ids, sizes, masks)
            except UnusableError as error:
                entry_id = entry.get("id", "?") if isinstance(entry, dict) else json.dumps(entry)[:60]
                self._add_problem(f"annotation {entry_id}", error)
            else:
                if checked is not None:
                    objects_of[image_id].append(checked)
        annotations = self._pack(paths, sizes, objects_of, masks)
        self._note_corrections()
        self._check_conventions(annotations)
        return annotations

    def _add_problem(self, subject: str, error: UnusableError) -> None:
        self.findings.problems.append(f"{self.file}: {subject} {error}.")
        self.left_out[error.reason] += 1

    def _note(self, text: str) -> None:
        self.findings.notes.append(f"{self.file}: {text}")

    def _note_corrections(self) -> None:
        for count, text in (
            (self.left_out["objects without area"], "object{s} left out: no area"),
            (self.num_clipped, "object{s} clipped at the edge of the image"),
            (self.num_parts, "polygon{s} of fewer than three points left out"),
        ):
            if count:
                self._note(f"{count} {text.format(s='s' if count > 1 else '')}.")
        num_crowds, num_objects = self.left_out["crowds (iscrowd 1)"], len(self.boxes) // 6
        if num_objects / 10 < num_crowds < num_objects:
            text = f"{self.file}: {num_crowds:,} of {num_objects:,} objects are crowds (iscrowd 1). {ON_CROWDS}"
            self.findings.notes.append(Note(text, "lost labels"))

    def _check_conventions(self, annotations: Annotations) -> None:
        """Report boxes and masks that follow a convention other than COCO's."""
        table = np.array(self.boxes).reshape(-1, 6)
        boxes, sizes = table[:, :4], table[:, 4:]
        comparison, fault = compare_boxes(annotations), diagnose_boxes(boxes, sizes)
        count = f"{len(comparison.differing):,} of {comparison.compared:,} boxes do not fit the masks of their objects"
        if comparison.cause and (not fault or comparison.cause not in (UNKNOWN, SHARES)):
            fault = f"{count}: {comparison.cause}"  # the masks say more than the boxes alone
        if fault:
            self.findings.fatal.append(f"{self.file}: {fault}.")
            others = [line for line in self.findings.problems if " outside the " not in line]  # these follow from it
            self.findings.problems = others
        elif comparison.differing:
            row = int(np.searchsorted(annotations.starts, comparison.differing[0], side="right")) - 1
            self._note(f"{count}, the first in image {annotations.names[row]}.")
        if comparison.num_blank:
            total = comparison.num_blank + comparison.compared
            self._note(
                f"{comparison.num_blank:,} of {total:,} masks are too thin to cover a pixel, and are not learned."
            )
        if fault:
            return
        if are_in_corner(boxes, sizes):
            text = "all boxes lie in the upper left quarter of their images: do they belong to images of another size?"
            self._note(text)
        if num_narrow := int(((boxes[:, 2:] > 0).all(1) & (boxes[:, 2:] < 1).any(1)).sum()):
            self._note(f"{num_narrow:,} boxes are narrower than a pixel.")

    def _check_image(self, image: dict[str, Any], is_repeated: bool) -> tuple[str, tuple[int, int]]:
        """Return the path, relative to the folder of images, and height and width. Raises UnusableError."""
        reason = "images that cannot be used"
        if is_repeated:
            raise UnusableError("is listed twice", reason)
        name = file_name(image)
        if not name:
            raise UnusableError("has no 'file_name'", reason)
        path = self.files.find(name)
        stated = [as_integer(image.get(side)) for side in ("height", "width")]
        for side, value in zip(("height", "width"), stated, strict=True):
            if value is None and image.get(side) is not None:
                raise UnusableError(f"states a {side} that is not an integer: {json.dumps(image[side])[:40]}", reason)
        actual = header_size(self.files.root / path)
        if actual is None:  # training later skips the image, like every image that cannot be read
            height, width = stated
            if height is None or width is None or min(height, width) <= 0:
                raise UnusableError(f"'{name}' cannot be read, and the annotations state no size", reason)
            return path, (height, width)
        if any(value not in (None, side) for value, side in zip(stated, actual, strict=True)):
            raise UnusableError(
                f"'{name}' is {format_size(actual)} pixels, but the annotations state {format_size(stated)}",
                "images of another size than stated",
            )
        return path, actual

    def _check_object(
        self, entry: Any, image_ids: set[int], sizes: dict[int, tuple[int, int]], masks: bool
    ) -> tuple[int, _Object | None]:
        """Return the id of the image and the object; None if it has no area, or if its image cannot be used.

        `sizes` has the height and width of the usable images. Raises UnusableError.
        """
        if not isinstance(entry, dict):
            raise UnusableError("is not a JSON object")
        image_id, category = as_integer(entry.get("image_id")), as_integer(entry.get("category_id"))
        if image_id is None or image_id not in image_ids:
            raise UnusableError(f"refers to image {entry.get('image_id')}, which does not exist")
        if category is None or category not in self.names:
            raise UnusableError(f"refers to category {entry.get('category_id')}, which does not exist")
        if image_id not in sizes:  # the image itself is already reported
            self.left_out["objects of images that cannot be used"] += 1
            return image_id, None
        height, width = sizes[image_id]
        segment, is_inside, parts = (
            clean_segment(entry.get("segmentation"), height, width) if masks else (None, True, 0)
        )
        box = parse_box(entry.get("bbox"), partial(mask_box, segment, height, width) if masks else None)
        is_crowd = as_flag(entry.get("iscrowd"))
        x, y, w, h = box
        self.boxes.extend((*box, height, width))
        if w <= 0 or h <= 0:
            self.left_out["objects without area"] += 1
            return image_id, None
        if x >= width or y >= height or x + w <= 0 or y + h <= 0:
            raise UnusableError(f"has a box outside the {format_size((height, width))} pixels of its image", OUTSIDE)
        # Coordinates written with two decimals may exceed the edge by 0.01.
        self.num_clipped += not is_inside or x < -0.01 or y < -0.01 or x + w > width + 0.01 or y + h > height + 0.01
        self.num_parts += parts
        area = as_number(entry.get("area"))
        if area is None or area <= 0:
            area = segment_area(segment, height, width) if masks else w * h
        encoded = encode_segment(segment) if masks else None
        return image_id, _Object(box, category, is_crowd, float(area), encoded)

    def _pack(
        self,
        paths: dict[int, str],
        sizes: dict[int, tuple[int, int]],
        objects_of: dict[int, list[_Object]],
        masks: bool,
    ) -> Annotations:
        import pyarrow as pa

        objects = [item for row in objects_of.values() for item in row]
        counts = [len(row) for row in objects_of.values()]
        self.left_out["crowds (iscrowd 1)"] = sum(item.crowd for item in objects)
        return Annotations(
            root=self.files.root,
            names=np.array(list(paths.values()), dtype=np.str_),
            image_ids=np.array(list(sizes), dtype=np.int64),
            sizes=np.array(list(sizes.values()), dtype=np.int64).reshape(-1, 2),
            starts=np.cumsum([0, *counts], dtype=np.int64),
            boxes=np.array([item.box for item in objects], dtype=np.float64).reshape(-1, 4),
            categories=np.array([item.category for item in objects], dtype=np.int64),
            crowd=np.array([item.crowd for item in objects], dtype=np.bool_),
            areas=np.array([item.area for item in objects], dtype=np.float64),
            segments=pa.array([item.segment for item in objects], pa.large_binary()) if masks else None,
            category_names=self.names,
            left_out=dict(+self.left_out),
        )


class _Object(NamedTuple):
    box: tuple[float, float, float, float]
    category: int
    crowd: bool
    area: float
    segment: bytes | None
