"""Sources of images with objects: boxes and, where there are any, masks, in COCO's format.

    train/ val/ (valid/, test/)   in each instances.json or _annotations.coco.json, beside images/ or among the images
    annotations/                  instances_NAME.json, as COCO's own, with the images in NAME/ or images/NAME/
    one file                      instances.json beside images/: 10% of them are held out

Everything that is wrong with them is said at once, by file, when they are opened (see `pecobook.data.dense.coco`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pecobook.data.dense.coco import Annotations, Findings, Packed, read_annotations
from pecobook.data.dense.coco_masks import decode_masks
from pecobook.data.source import ImageSource, Integers, Splits, hold_out, split_from_name
from pecobook.errors import DataError, did_you_mean

_FILES = ("instances.json", "_annotations.coco.json", "annotations.json")
_FOLDERS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
_SHOWN = 10

DETECTION_FORMS = (
    "It is a folder with train/instances.json and train/images/, the same for val; or, as COCO's, "
    "annotations/instances_train2017.json and train2017/."
)


@dataclasses.dataclass(frozen=True)
class Objects:
    """What is on one image, without crowds; its masks are decoded when they are asked for."""

    boxes: Tensor
    """Left, top, right, bottom in pixels, cut at the image's edge: float32 (n, 4)."""
    labels: Tensor
    """1 to C, int64 (n,); 0 is the background's."""
    segments: tuple[bytes, ...] | None
    """Masks as JSON, see `decode_masks`; None where the source has none."""
    size: tuple[int, int]
    """Height and width of the image, pixels."""

    def masks(self) -> Tensor | None:
        """uint8 (n, H, W), 1 inside; None where the source has none."""
        return None if self.segments is None else decode_masks(self.segments, *self.size)


class DetectionSource(ImageSource):
    """Images of one split with their objects.

    Attributes:
        annotations: of the file that the split comes from.
        classes: names; the objects of class k have the label k + 1.
        category_ids: the id of each class in the annotations.
        notes: what was mended or left out, as lines for the user.
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
    ) -> None:
        super().__init__(annotations, name=name, split=split, rows=rows, classes=classes)
        self.annotations, self.category_ids, self.notes = annotations, category_ids, notes
        self._labels = {category: number for number, category in enumerate(category_ids, start=1)}

    @property
    def has_masks(self) -> bool:
        """Whether the objects have masks."""
        return self.annotations.segments is not None

    def sample(self, index: int) -> tuple[Tensor, Objects]:
        """The image uint8 (3, H, W) and what is on it. Raises BadImage."""
        return self.read(index), self.objects(index)

    def objects(self, index: int) -> Objects:
        """What is on image `index`, crowds left out."""
        found, row = self.annotations, self._row(index)
        chosen = [number for number in self._numbers(row) if not found.crowd[number]]
        height, width = (int(side) for side in found.sizes[row])
        corners = found.boxes[chosen]  # (n, 4)
        corners[:, 2:] += corners[:, :2]
        corners = corners.clip(0, [width, height, width, height])
        return Objects(
            boxes=torch.from_numpy(corners.astype(np.float32)),
            labels=torch.tensor([self._labels[int(found.categories[number])] for number in chosen], dtype=torch.int64),
            segments=None if found.segments is None else tuple(found.segments[number] for number in chosen),
            size=(height, width),
        )

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of image `index`, pixels."""
        height, width = self.annotations.sizes[self._row(index)]
        return int(height), int(width)

    def image_id(self, index: int) -> int:
        """The id of image `index` in the annotations."""
        return int(self.annotations.image_ids[self._row(index)])

    def truth(self, indices: Iterable[int]) -> dict[str, Any]:
        """These images and their objects, crowds too, as the content of a file in COCO's format."""
        found = self.annotations
        images: list[dict[str, Any]] = []
        objects: list[dict[str, Any]] = []
        for index in indices:
            row, (height, width) = self._row(index), self.size(index)
            image = self.image_id(index)
            images.append({"id": image, "file_name": str(found.names[row]), "height": height, "width": width})
            for number in self._numbers(row):
                one = {
                    "id": number + 1,  # pycocotools takes 0 for no match
                    "image_id": image,
                    "category_id": int(found.categories[number]),
                    "bbox": found.boxes[number].tolist(),
                    "area": float(found.areas[number]),
                    "iscrowd": int(found.crowd[number]),
                }
                objects.append(one)
                if found.segments is not None:
                    one["segmentation"] = json.loads(found.segments[number])
        pairs = zip(self.category_ids, self.classes, strict=True)
        categories = [{"id": number, "name": name} for number, name in pairs]
        return {"images": images, "annotations": objects, "categories": categories}

    def subset(self, indices: Iterable[int] | Integers) -> DetectionSource:
        """The same source with only these images, in this order."""
        return DetectionSource(
            self.annotations,
            name=self.name,
            split=self.split,
            classes=self.classes,
            category_ids=self.category_ids,
            rows=super().subset(indices)._rows,
            notes=self.notes,
        )

    def _numbers(self, row: int) -> range:
        """Numbers of the objects of a row."""
        return range(int(self.annotations.starts[row]), int(self.annotations.starts[row + 1]))


# ------------------------------------------------------------------------------------------------------------- opening


def open_detection(data: str, *, skip_bad: bool = False, masks: bool = True) -> Splits:
    """Open a folder of images with objects; both splits are `DetectionSource`s.

    Args:
        data: the folder, see the top of this file.
        skip_bad: leave out images and objects that cannot be used instead of refusing them.
        masks: False takes the boxes alone.

    Raises:
        DataError: there is no such source, or, all at once, what is wrong with it.
    """
    parts = _find(data)
    findings = Findings()
    read = {name: read_annotations(file, root, findings, masks=masks) for name, (file, root) in parts.items()}
    found = {name: annotations for name, annotations in read.items() if annotations is not None}
    if len(found) == len(read):
        _compare(found, {name: file for name, (file, _) in parts.items()}, findings)
    _refuse(data, findings, skip_bad)
    notes = [*findings.notes]
    if findings.problems:
        notes.append(f"--skip-bad left out: {len(findings.problems)}, the first: {findings.problems[0]}")
    return _assemble(data, found, tuple(notes))


def _find(data: str) -> dict[str, tuple[Path, Path]]:
    """For "train" and at most one other split: the file of annotations and the folder of images."""
    root = Path(data).expanduser()
    if not data or not root.is_dir():
        missing = f"--data '{data}' is no folder." if data else "--data is missing."
        raise DataError(f"{missing}\n{DETECTION_FORMS}")
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
                "Keep one of them there."
            )
    other = next((name for name in ("test", "validation") if name in parts), None)
    return {name: files[0] for name, files in parts.items() if name in ("train", other)}


def _files_in(folder: Path) -> list[Path]:
    return [folder / name for name in _FILES if (folder / name).is_file()]


def _images_of(folder: Path) -> Path:
    return folder / "images" if (folder / "images").is_dir() else folder


def _compare(found: Mapping[str, Annotations], files: Mapping[str, Path], findings: Findings) -> None:
    """Note categories of the other split that training does not know, and masks that one of the two lacks."""
    train = found["train"]
    known = set(train.category_names.values())
    for name, other in found.items():
        for category in np.unique(other.categories).tolist():
            own = other.category_names[category]
            if own not in known:
                count = int((other.categories == category).sum())
                near = did_you_mean(own, known)
                what = f"category {category} '{own}' ({count} objects)"
                findings.problems.append(f"{files[name]}: {what} is unknown in {files['train']}.{near}")
        if len(train.boxes) and len(other.boxes) and (train.segments is None) != (other.segments is None):
            without, having = (name, "train") if other.segments is None else ("train", name)
            findings.fatal.append(f"{files[without]}: has no masks, but {files[having]} has. Give --no-masks.")


def _refuse(data: str, findings: Findings, skip_bad: bool) -> None:
    """Raise DataError with all that is wrong, unless it may be left out."""
    lines = findings.fatal + ([] if skip_bad else findings.problems)
    if not lines:
        return
    more = f"\n... and {len(lines) - _SHOWN:,} more." if len(lines) > _SHOWN else ""
    remedy = "\nMend them" + ("." if findings.fatal else ", or leave what is bad out with --skip-bad.")
    count = f"{len(lines):,} problem{'s' if len(lines) > 1 else ''}"
    raise DataError(f"--data '{data}' has {count}:\n" + "\n".join(lines[:_SHOWN]) + more + remedy)


def _assemble(data: str, found: Mapping[str, Annotations], notes: tuple[str, ...]) -> Splits:
    train = found["train"]
    classes = tuple(train.category_names.values())
    sources = {}
    for name, split in found.items():
        if not len(split):
            raise DataError(f"--data '{data}': no image of {name} can be used.")
        sources[name] = DetectionSource(
            split if name == "train" else _without_unknown(split, classes),
            name=data,
            split="train" if name == "train" else "evaluation",
            classes=classes,
            category_ids=_category_ids(split.category_names, train.category_names),
            notes=notes if name == "train" else (),
        )
    if not len(train.boxes):
        raise DataError(f"--data '{data}': no object of train can be used.")
    other = next((name for name in sources if name != "train"), None)
    return Splits(sources["train"], sources[other], other) if other else hold_out(sources["train"])


def _category_ids(own: Mapping[int, str], train: Mapping[int, str]) -> tuple[int, ...]:
    """The id in `own` of each class of training; a class that is not in `own` gets a free one."""
    by_name = {name: number for number, name in own.items()}
    taken, ids = set(own), []
    for number, name in train.items():
        if name not in by_name:
            by_name[name] = number if number not in taken else max(taken) + 1
            taken.add(by_name[name])
        ids.append(by_name[name])
    return tuple(ids)


def _without_unknown(found: Annotations, classes: tuple[str, ...]) -> Annotations:
    """The same without objects of categories that training does not know."""
    known = [number for number, name in found.category_names.items() if name in classes]
    kept = np.isin(found.categories, known)
    if kept.all():
        return found
    numbers = np.flatnonzero(kept)
    return dataclasses.replace(
        found,
        starts=np.r_[0, np.cumsum(kept)][found.starts],
        boxes=found.boxes[numbers],
        categories=found.categories[numbers],
        crowd=found.crowd[numbers],
        areas=found.areas[numbers],
        segments=None if found.segments is None else Packed([found.segments[int(number)] for number in numbers]),
    )
