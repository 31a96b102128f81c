"""Sources of images with annotated objects (boxes and optional masks) in COCO's format.

A source has one of these layouts:

    train/ val/ test/             each with instances.json or _annotations.coco.json, next to images/ or to the images;
                                  other names of splits: names.py
    annotations/                  instances_NAME.json, as in COCO, with the images in NAME/ or images/NAME/
    one file                      instances.json next to images/; 10% of the images are held out

coco_files.py lists further names of files and folders, which other tools write.

Opening a source reports all its problems together, by file (see `pecobook.data.dense.coco`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pecobook.data.dense.coco import ON_CROWDS, Findings, read_annotations
from pecobook.data.dense.coco_annotations import Annotations
from pecobook.data.dense.coco_files import count_unnamed, find_annotations, other_format, stray_annotations
from pecobook.data.dense.coco_values import decode_masks
from pecobook.data.source import ImageSource, Integers, Note, Splits, hold_out
from pecobook.errors import DataError, did_you_mean, grouped, listed, some_of

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
    segments: Sequence[bytes] | None
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
    ) -> None:
        super().__init__(annotations, name=name, split=split, classes=classes, left_out=annotations.left_out)
        self.annotations, self.category_ids = annotations, category_ids
        self._labels = {category: number for number, category in enumerate(category_ids, start=1)}

    @property
    def has_masks(self) -> bool:
        """Whether the objects have masks."""
        return self.annotations.segments is not None

    def sample(self, index: int, shortest: int = 0) -> tuple[Tensor, Objects]:
        """Read image `index`, uint8 (3, H, W), and its objects, in pixels of the whole image. Raises BadImage."""
        return self.annotations.read(self._row(index), shortest), self.objects(index)

    def objects(self, index: int) -> Objects:
        """Return the objects of image `index`, without crowds."""
        annotations, row = self.annotations, self._row(index)
        numbers = [number for number in self._object_range(row) if not annotations.crowd[number]]
        height, width = (int(side) for side in annotations.sizes[row])
        corners = annotations.boxes[numbers]  # (n, 4)
        corners[:, 2:] += corners[:, :2]
        corners = corners.clip(0, [width, height, width, height])
        labels = [self._labels[category] for category in annotations.categories[numbers].tolist()]
        return Objects(
            boxes=torch.from_numpy(corners.astype(np.float32)),
            labels=torch.tensor(labels, dtype=torch.int64),
            segments=annotations.segments_of(numbers),
            size=(height, width),
        )

    def objects_per_class(self) -> dict[str, int]:
        """Return the number of objects of each class, without crowds."""
        counts = Counter(self.annotations.categories[self._used_objects()[0]].tolist())
        return {name: counts[number] for name, number in zip(self.classes, self.category_ids, strict=True)}

    @property
    def num_empty(self) -> int:
        """Number of images without an object."""
        return len(self) - len(np.unique(self._used_objects()[1]))

    def _used_objects(self) -> tuple[Integers, Integers]:
        """Return the indices and the rows of the objects of these images, without crowds."""
        annotations = self.annotations
        row_of_object = np.repeat(np.arange(len(annotations)), np.diff(annotations.starts))
        numbers = np.flatnonzero(np.isin(row_of_object, self.rows) & ~annotations.crowd)
        return numbers, row_of_object[numbers]

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
            numbers = self._object_range(row)
            segments = annotations.segments_of(numbers)
            for place, number in enumerate(numbers):
                entry = {
                    "id": number + 1,  # pycocotools uses the id 0 for "no match"
                    "image_id": image_id,
                    "category_id": int(annotations.categories[number]),
                    "bbox": annotations.boxes[number].tolist(),
                    "area": float(annotations.areas[number]),
                    "iscrowd": int(annotations.crowd[number]),
                }
                objects.append(entry)
                if segments is not None:
                    entry["segmentation"] = json.loads(segments[place])
        categories = [{"id": n, "name": name} for n, name in zip(self.category_ids, self.classes, strict=True)]
        return {"images": images, "annotations": objects, "categories": categories}

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
    splits: dict[str, Annotations] = {}
    for name in ("train", "test", "validation"):
        if name in parts and not (name == "validation" and "test" in splits and len(splits["test"].boxes)):
            file, folders = parts[name]
            annotations = read_annotations(file, folders, findings, masks=masks)
            splits |= {name: annotations} if annotations is not None else {}
    if "validation" in splits and "test" in splits:
        findings.notes.append(f"{parts['test'][0]}: holds no object, so that the validation split is evaluated.")
        splits.pop("test")
    elif "test" in splits and not len(splits["test"].boxes) and not splits["test"].left_out:
        findings.notes.append(f"{parts['test'][0]}: holds no object, so that 10% of the training images are held out.")
        splits.pop("test")
    elif "validation" in parts and "test" in parts:
        findings.notes.append(f"{parts['validation'][0]}: is not used, because the test split is held out.")
    if not findings.fatal:
        _compare_splits(splits, {name: file for name, (file, _) in parts.items()}, findings)
    _raise_findings(data, findings, skip_bad)
    if findings.problems:
        findings.notes.append(f"--skip-bad left out: {len(findings.problems)}, the first: {findings.problems[0]}")
    for name, split in splits.items():
        _require_objects(data, parts[name][0], split, skip_bad)
    if len(splits) == len(parts):
        named = {part.root / name for part in splits.values() for name in part.names.tolist()}
        count = count_unnamed(named)
        splits["train"].left_out |= {"images that no annotations name": count} if count else {}
    files = tuple(parts[name][0] for name in splits)
    return dataclasses.replace(_assemble(data, splits, findings.notes), files=files)


def _find_annotations(data: str) -> dict[str, tuple[Path, list[Path]]]:
    """Return (annotation file, folders of images) for "train" and the declared evaluation splits."""
    root = Path(data).expanduser()
    if not data or not root.is_dir():
        reason = f"--data '{data}' is not a folder." if data else "--data is missing."
        raise DataError(f"{reason}\n{DETECTION_FORMS}")
    parts = find_annotations(root)
    if not parts.get("train"):
        if stray := stray_annotations(root):
            reason = f"; {stray} has that format, but lies where none are looked for"
        else:
            kind = other_format(root)
            reason = f"; {kind} cannot be read, convert them to COCO's JSON" if kind else ""
        raise DataError(f"--data '{data}' holds no training annotations in COCO's format{reason}.\n{DETECTION_FORMS}")
    for split, files in parts.items():
        if len(files) > 1:
            raise DataError(
                f"--data '{data}' has more than one file of {split} annotations: {files[0][0]} and {files[1][0]}.\n"
                "Keep only one of the two files."
            )
    return {name: files[0] for name, files in parts.items()}


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
    problems = findings.fatal + ([] if skip_bad else findings.problems)
    if not problems:
        return
    # Problems of one kind differ only in numbers and quoted names.
    kinds = [re.sub(r"'[^']*'|\"[^\"]*\"|[-+.\d]+", "#", problem) for problem in problems]
    lines = grouped(zip(kinds, problems, strict=True), "more like this")
    remedy = ".\nCorrect them" if len(lines) > _MAX_LINES else "\nCorrect them"
    remedy += "." if findings.fatal else ", or leave out these images and objects with --skip-bad."
    count = f"{len(problems):,} problem{'s' if len(problems) > 1 else ''}"
    raise DataError(f"--data '{data}' has {count}:\n" + listed(lines, _MAX_LINES) + remedy)


def _require_objects(data: str, file: Path, annotations: Annotations, skip_bad: bool) -> None:
    """Raise DataError if no object of a file can be used, or less than a tenth unless `skip_bad` allows it."""
    if not len(annotations):
        raise DataError(f"--data '{data}': no image of {file} can be used.")
    lost = Counter({reason: n for reason, n in annotations.left_out.items() if not reason.startswith("images")})
    num_usable = int((~annotations.crowd).sum())
    total = num_usable + lost.total()
    if num_usable > (0 if skip_bad else total / 10):
        return
    if not total:
        raise DataError(f"--data '{data}': {file} holds no object, its list 'annotations' is empty.")
    remedy = "Correct them, or leave them out with --skip-bad." if num_usable else "Correct them."
    if max(lost, key=lost.__getitem__).startswith("crowds"):
        remedy = ON_CROWDS
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in lost.items())
    raise DataError(
        f"--data '{data}': {num_usable or 'none'} of {total:,} objects of {file} can be used: {reasons}.\n{remedy}"
    )


def _assemble(data: str, annotations: Mapping[str, Annotations], notes: Iterable[str]) -> Splits:
    train = annotations["train"]
    classes = tuple(train.category_names.values())
    sources = {
        name: DetectionSource(
            split if name == "train" else _only_classes(split, classes),
            name=data,
            split="train" if name == "train" else "evaluation",
            classes=classes,
            category_ids=_category_ids(split.category_names, train.category_names),
        )
        for name, split in annotations.items()
    }
    evaluation = next((name for name in sources if name != "train"), None)
    splits = Splits(sources["train"], sources[evaluation], evaluation) if evaluation else hold_out(sources["train"])
    training, held_out = cast("DetectionSource", splits.train), cast("DetectionSource", splits.evaluation)
    return dataclasses.replace(splits, notes=(*notes, *_notes_on_content(data, training, held_out)))


def _notes_on_content(data: str, train: DetectionSource, held_out: DetectionSource) -> list[str]:
    """Return a note on classes without an object, in training and in evaluation, and on images without one."""
    notes: list[str] = []
    for source, kind, text in (
        (train, "empty classes", "in training, and are not learned"),
        (held_out, "", "among the held-out images, and do not count in the average precision"),
    ):
        missing = [name for name, count in source.objects_per_class().items() if not count]
        if missing:
            total = f"{len(missing)} of {len(source.classes)} classes have no object {text}"
            notes.append(Note(f"--data '{data}': {total}: {some_of(missing)}.", kind))
    names = {train.identify(index) for index in range(len(train))}
    shared = [name for index in range(len(held_out)) if (name := held_out.identify(index)) in names]
    if shared:
        notes.append(
            f"--data '{data}': {len(shared):,} held-out images are training images too, the first: {shared[0]}."
        )
    if 2 * train.num_empty > len(train):
        notes.append(f"--data '{data}': {train.num_empty:,} of {len(train):,} training images have no object.")
    return notes


def _category_ids(category_names: Mapping[int, str], train: Mapping[int, str]) -> tuple[int, ...]:
    """Return the id in `category_names` of each training class; a class without an id there gets an unused id."""
    id_of = {name: number for number, name in category_names.items()}
    for number, name in train.items():
        used = set(id_of.values())
        id_of.setdefault(name, number if number not in used else max(used) + 1)
    return tuple(id_of[name] for name in train.values())


def _only_classes(annotations: Annotations, classes: tuple[str, ...]) -> Annotations:
    """Return the annotations without the objects whose category is not in `classes`."""
    categories = [number for number, name in annotations.category_names.items() if name in classes]
    is_kept = np.isin(annotations.categories, categories)
    if is_kept.all():
        return annotations
    segments = annotations.segments
    return dataclasses.replace(
        annotations,
        starts=np.r_[0, np.cumsum(is_kept)][annotations.starts],
        boxes=annotations.boxes[is_kept],
        categories=annotations.categories[is_kept],
        crowd=annotations.crowd[is_kept],
        areas=annotations.areas[is_kept],
        segments=None if segments is None else segments.take(np.flatnonzero(is_kept)),
    )
