"""Sources of images with annotated objects (boxes and optional masks) in COCO's format.

A source has one of these layouts:

    train/ val/ (valid/, test/)   each with instances.json or _annotations.coco.json, next to images/ or to the images
    annotations/                  instances_NAME.json, as in COCO, with the images in NAME/ or images/NAME/
    one file                      instances.json next to images/; 10% of the images are held out

Opening a source reports all its problems together, by file (see `pecobook.data.dense.coco`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pecobook.data.dense.coco import Annotations, Findings, PackedBytes, read_annotations
from pecobook.data.dense.coco_masks import decode_masks
from pecobook.data.source import ImageSource, Integers, Splits, hold_out, split_from_name
from pecobook.errors import DataError, did_you_mean

_FILES = ("instances.json", "_annotations.coco.json", "annotations.json")
_FOLDERS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
_MAX_LINES = 10

DETECTION_FORMS = (
    "Give a folder with train/instances.json, train/images/, val/instances.json and val/images/; or, as in COCO, "
    "with annotations/instances_train2017.json and train2017/."
)


@dataclasses.dataclass(frozen=True)
class Objects:
    """The objects of one image, without crowds."""

    boxes: Tensor
    """Left, top, right, bottom in pixels, clipped at the image's edge: float32 (n, 4)."""
    labels: Tensor
    """1 to C, int64 (n,); 0 stands for the background."""
    segments: tuple[bytes, ...] | None
    """Masks as JSON, see `decode_masks`; None if the source has no masks."""
    size: tuple[int, int]
    """Height and width of the image in pixels."""

    def masks(self) -> Tensor | None:
        """Decode the masks: uint8 (n, H, W), 1 inside; None if the source has no masks."""
        return None if self.segments is None else decode_masks(self.segments, *self.size)


class DetectionSource(ImageSource):
    """The images of one split with their objects.

    Attributes:
        annotations: the content of the split's annotation file.
        classes: names of the classes; the objects of class k have the label k + 1.
        category_ids: the id of each class in the annotations.
        notes: corrections and omissions, as lines for the user.
        left_out: reason -> number of images and objects that the file has but training and scores do not use.
    """

    classes: tuple[str, ...]

    def __init__(
        self,
        annotations: Annotations,
        *,
        name: str,
        split: str,
        classes: tuple[str, ...],
        category_ids: tuple[int, ...],
        rows: Integers | None = None,
        notes: tuple[str, ...] = (),
        left_out: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(annotations, name=name, split=split, rows=rows, classes=classes)
        self.annotations, self.category_ids, self.notes = annotations, category_ids, notes
        self.left_out = dict(left_out or {})
        self._labels = {category: number for number, category in enumerate(category_ids, start=1)}

    @property
    def has_masks(self) -> bool:
        """Whether the objects have masks."""
        return self.annotations.segments is not None

    def sample(self, index: int) -> tuple[Tensor, Objects]:
        """Read image `index`, uint8 (3, H, W), and its objects. Raises BadImage."""
        return self.read(index), self.objects(index)

    def objects(self, index: int) -> Objects:
        """Return the objects of image `index`, without crowds."""
        annotations, row = self.annotations, self._row(index)
        numbers = [number for number in self._object_range(row) if not annotations.crowd[number]]
        height, width = (int(side) for side in annotations.sizes[row])
        corners = annotations.boxes[numbers]  # (n, 4)
        corners[:, 2:] += corners[:, :2]
        corners = corners.clip(0, [width, height, width, height])
        return Objects(
            boxes=torch.from_numpy(corners.astype(np.float32)),
            labels=torch.tensor(
                [self._labels[int(annotations.categories[number])] for number in numbers], dtype=torch.int64
            ),
            segments=None if annotations.segments is None else tuple(annotations.segments[n] for n in numbers),
            size=(height, width),
        )

    def labels_of_objects(self) -> Integers:
        """Return the label, 1 to C, of each object of these images, without crowds: int64 (n,)."""
        annotations = self.annotations
        row_of_object = np.repeat(np.arange(len(annotations)), np.diff(annotations.starts))
        rows = np.arange(len(annotations)) if self._rows is None else self._rows
        is_used = np.isin(row_of_object, rows) & ~annotations.crowd
        numbers = np.array([self._labels[int(category)] for category in np.unique(annotations.categories)], np.int64)
        return numbers[np.unique(annotations.categories, return_inverse=True)[1][is_used]]

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of image `index` in pixels."""
        height, width = self.annotations.sizes[self._row(index)]
        return int(height), int(width)

    def image_id(self, index: int) -> int:
        """Return the id of image `index` in the annotations."""
        return int(self.annotations.image_ids[self._row(index)])

    def ground_truth(self, indices: Iterable[int]) -> dict[str, Any]:
        """Return images and their objects, including crowds, as the content of a file in COCO's format."""
        annotations = self.annotations
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for index in indices:
            row, (height, width) = self._row(index), self.size(index)
            image_id = self.image_id(index)
            images.append({"id": image_id, "file_name": str(annotations.names[row]), "height": height, "width": width})
            for number in self._object_range(row):
                entry = {
                    "id": number + 1,  # pycocotools uses the id 0 for "no match"
                    "image_id": image_id,
                    "category_id": int(annotations.categories[number]),
                    "bbox": annotations.boxes[number].tolist(),
                    "area": float(annotations.areas[number]),
                    "iscrowd": int(annotations.crowd[number]),
                }
                objects.append(entry)
                if annotations.segments is not None:
                    entry["segmentation"] = json.loads(annotations.segments[number])
        pairs = zip(self.category_ids, self.classes, strict=True)
        categories = [{"id": number, "name": name} for number, name in pairs]
        return {"images": images, "annotations": objects, "categories": categories}

    def subset(self, indices: Iterable[int] | Integers) -> DetectionSource:
        """Return a source with only the given images, in the given order."""
        return DetectionSource(
            self.annotations,
            name=self.name,
            split=self.split,
            classes=self.classes,
            category_ids=self.category_ids,
            rows=super().subset(indices)._rows,
            notes=self.notes,
            left_out=self.left_out,
        )

    def _object_range(self, row: int) -> range:
        """Return the indices of the objects of a row."""
        return range(int(self.annotations.starts[row]), int(self.annotations.starts[row + 1]))


# ------------------------------------------------------------------------------------------------------------- opening


def open_detection(data: str, *, skip_bad: bool = False, masks: bool = True) -> Splits:
    """Open a folder of images with objects; both splits are `DetectionSource`s.

    Args:
        data: the folder, in a layout that the top of this file lists.
        skip_bad: leave out images and objects that cannot be used, instead of raising DataError.
        masks: False reads only the boxes.

    Raises:
        DataError: there is no such source, or the source has problems; the message lists the problems.
    """
    parts = _find_annotations(data)
    findings = Findings()
    read = {name: read_annotations(file, root, findings, masks=masks) for name, (file, root) in parts.items()}
    splits = {name: annotations for name, annotations in read.items() if annotations is not None}
    if len(splits) == len(read):
        _compare_splits(splits, {name: file for name, (file, _) in parts.items()}, findings)
    _raise_findings(data, findings, skip_bad)
    notes = [*findings.notes]
    if findings.problems:
        notes.append(f"--skip-bad left out: {len(findings.problems)}, the first: {findings.problems[0]}")
    return _assemble(data, splits, tuple(notes))


def _find_annotations(data: str) -> dict[str, tuple[Path, Path]]:
    """Return (annotation file, folder of images) for "train" and, if there is one, the evaluation split."""
    root = Path(data).expanduser()
    if not data or not root.is_dir():
        reason = f"--data '{data}' is not a folder." if data else "--data is missing."
        raise DataError(f"{reason}\n{DETECTION_FORMS}")
    parts: dict[str, list[tuple[Path, Path]]] = {}
    for folder in sorted(path for path in root.iterdir() if path.name.lower() in _FOLDERS and path.is_dir()):
        for file in _files_in(folder):
            parts.setdefault(_FOLDERS[folder.name.lower()], []).append((file, _images_of(folder)))
    if not parts:
        for file in sorted((root / "annotations").glob("instances_*.json")):
            name = file.stem.removeprefix("instances_")
            images = root / name if (root / name).is_dir() else root / "images" / name
            parts.setdefault(split_from_name(name) or "train", []).append((file, images))
    if not parts:
        parts = {"train": [(file, _images_of(root)) for file in _files_in(root)]}
    if not parts.get("train"):
        raise DataError(f"--data '{data}' holds no training annotations in COCO's format.\n{DETECTION_FORMS}")
    for split, files in parts.items():
        if len(files) > 1:
            raise DataError(
                f"--data '{data}' has more than one file of {split} annotations: {files[0][0]} and {files[1][0]}.\n"
                "Keep only one of the two files."
            )
    evaluation = next((name for name in ("test", "validation") if name in parts), None)
    return {name: files[0] for name, files in parts.items() if name in ("train", evaluation)}


def _files_in(folder: Path) -> list[Path]:
    return [folder / name for name in _FILES if (folder / name).is_file()]


def _images_of(folder: Path) -> Path:
    return folder / "images" if (folder / "images").is_dir() else folder


def _compare_splits(splits: Mapping[str, Annotations], files: Mapping[str, Path], findings: Findings) -> None:
    """Report categories of the evaluation split that training lacks, and masks that only one of the splits has."""
    train = splits["train"]
    train_categories = set(train.category_names.values())
    for name, split in splits.items():
        for category in np.unique(split.categories).tolist():
            category_name = split.category_names[category]
            if category_name not in train_categories:
                count = int((split.categories == category).sum())
                suggestion = did_you_mean(category_name, train_categories)
                subject = f"category {category} '{category_name}' ({count} objects)"
                findings.problems.append(f"{files[name]}: {subject} is missing in {files['train']}.{suggestion}")
        if len(train.boxes) and len(split.boxes) and (train.segments is None) != (split.segments is None):
            without, with_masks = (name, "train") if split.segments is None else ("train", name)
            findings.fatal.append(f"{files[without]}: has no masks, but {files[with_masks]} has. Give --no-masks.")


def _raise_findings(data: str, findings: Findings, skip_bad: bool) -> None:
    """Raise DataError with all findings, except problems if `skip_bad` leaves them out."""
    lines = findings.fatal + ([] if skip_bad else findings.problems)
    if not lines:
        return
    more = f"\n... and {len(lines) - _MAX_LINES:,} more." if len(lines) > _MAX_LINES else ""
    remedy = "\nCorrect them" + ("." if findings.fatal else ", or leave out these images and objects with --skip-bad.")
    count = f"{len(lines):,} problem{'s' if len(lines) > 1 else ''}"
    raise DataError(f"--data '{data}' has {count}:\n" + "\n".join(lines[:_MAX_LINES]) + more + remedy)


def _assemble(data: str, splits: Mapping[str, Annotations], notes: tuple[str, ...]) -> Splits:
    train = splits["train"]
    classes = tuple(train.category_names.values())
    sources = {}
    for name, split in splits.items():
        if not len(split):
            raise DataError(f"--data '{data}': no image of {name} can be used.")
        sources[name] = DetectionSource(
            split if name == "train" else _only_classes(split, classes),
            name=data,
            split="train" if name == "train" else "evaluation",
            classes=classes,
            category_ids=_category_ids(split.category_names, train.category_names),
            notes=notes if name == "train" else (),
            left_out=split.left_out,
        )
    if not len(train.boxes):
        raise DataError(f"--data '{data}': no object of train can be used.")
    evaluation = next((name for name in sources if name != "train"), None)
    if evaluation:
        return Splits(sources["train"], sources[evaluation], evaluation)
    splits_of_one = hold_out(sources["train"])
    cast("DetectionSource", splits_of_one.evaluation).left_out = {}  # `train` has the counts of the whole file
    return splits_of_one


def _category_ids(category_names: Mapping[int, str], train: Mapping[int, str]) -> tuple[int, ...]:
    """Return the id in `category_names` of each training class; a class without an id there gets an unused id."""
    id_of = {name: number for number, name in category_names.items()}
    used, ids = set(category_names), []
    for number, name in train.items():
        if name not in id_of:
            id_of[name] = number if number not in used else max(used) + 1
            used.add(id_of[name])
        ids.append(id_of[name])
    return tuple(ids)


def _only_classes(annotations: Annotations, classes: tuple[str, ...]) -> Annotations:
    """Return the annotations without the objects whose category is not in `classes`."""
    categories = [number for number, name in annotations.category_names.items() if name in classes]
    is_kept = np.isin(annotations.categories, categories)
    if is_kept.all():
        return annotations
    numbers, segments = np.flatnonzero(is_kept), annotations.segments
    return dataclasses.replace(
        annotations,
        starts=np.r_[0, np.cumsum(is_kept)][annotations.starts],
        boxes=annotations.boxes[numbers],
        categories=annotations.categories[numbers],
        crowd=annotations.crowd[numbers],
        areas=annotations.areas[numbers],
        segments=None if segments is None else PackedBytes([segments[int(number)] for number in numbers]),
    )
