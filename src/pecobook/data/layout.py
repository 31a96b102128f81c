"""Reads splits and classes from the names of the folders that hold images.

The rules, in this order. "Folder" always means a folder with images in it or below it.

1. Folders of masks are not used: `masks/` next to `images/` and nothing else, or `train_masks/` next to `train/` or
   `train_images/`.
2. Wrappers are entered: a level with one folder and no image, such as the folder of an archive or `images/`. The
   folders in a wrapper named `train` are classes, unless all of them declare splits.
3. The level then reached declares splits if `names.split_folders` says so: training images and validation or test
   images, such as `Training/` and `Testing/`. Other folders and images of this level are not used. `train/` as the only
   folder, beside loose images, is the training split. The source is refused if neither the splits nor two or more
   folders beside them have subfolders: all of them may be classes.
4. If each folder of the level declares splits itself (`cat/train`, `cat/test`, `dog/train`, ...), it is a class.
   If only some of them do, or if these splits have the same class folders (`fold1/train/cat`, `fold2/train/cat`), the
   source is refused, because training and held-out images would be mixed.
5. Otherwise the folders of the level are classes, even one called "test" or "training". The source is refused if such a
   folder looks like a split: it has the classes of its neighbours as subfolders, or those of the one other folder
   beside it. A note names folders that are taken for classes though all have the same subfolders.
6. Wrappers are entered again in each split: `train/images/`, `seg_train/seg_train/`. The folders below are the classes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pecobook.data.names import (
    IMAGE_FOLDERS,
    IN_FOLDER_OF_MASKS,
    MASK_FOLDERS,
    is_split_folder,
    split_and_rest,
    split_folders,
    split_of_name,
)
from pecobook.data.parts import Labels, Part, one_form
from pecobook.data.source import Note, Store
from pecobook.errors import DataError, some_of

Folder: TypeAlias = tuple[str, ...]
"""The names on the path from the source to a folder."""

_IMAGENET_NAME = re.compile(r"ILSVRC2012_(val|test)_\d{8}\.JPEG")
_IMAGES = IMAGE_FOLDERS | {""}
_MASKS = MASK_FOLDERS | {"segmentationobject", "trimaps"}


@dataclass
class Layout:
    """What folders mean; the lists have one entry for each folder.

    Attributes:
        split_of: "train", "validation" or "test"; "" if the folder is not used.
        class_of: the class of the folder's images, or None.
        reason_of: why a folder is not used, in a few words.
        only_folder: the one folder that holds all training images, if there are no classes for this reason, else "".
        notes: sentences for the user.
    """

    split_of: list[str]
    class_of: list[str | None]
    reason_of: dict[int, str] = field(default_factory=dict)
    only_folder: str = ""
    notes: tuple[str, ...] = ()


def read_layout(source: str, folders: Sequence[Folder]) -> Layout:
    """Read the splits and the classes from folders that hold images directly, by the rules at the top of this file.

    Raises:
        DataError: it is unclear whether folders are splits or classes.
    """
    layout = Layout([""] * len(folders), [None] * len(folders))
    masks = _mask_folders(folders)
    layout.reason_of |= dict.fromkeys(masks, IN_FOLDER_OF_MASKS)
    numbers = [number for number in range(len(folders)) if number not in masks]
    depth = len(_wrappers(folders[number] for number in numbers))
    level = _Level([folders[number] for number in numbers], depth)
    splits = level.splits()
    inner = {} if splits or level.is_training_set else _splits_of_classes(source, level)
    if inner:
        _check_folds(source, [folders[number] for number in numbers], depth, inner)
        for number in numbers:
            layout.class_of[number] = name = folders[number][depth]
            layout.split_of[number] = inner[name].get(_at(folders[number], depth + 1), "")
    else:
        if not splits and not level.is_training_set:
            layout.notes = _notes_on_classes(source, level)
        level.check(source, splits)
        for number in numbers:
            layout.split_of[number] = splits.get(_at(folders[number], depth), "") if splits else "train"
        _read_classes(layout, folders, depth + 1 if splits else depth)
        if depth and not splits and not any(layout.class_of):
            layout.only_folder = level.path[-1]
    layout.reason_of |= {number: "not in a split folder" for number in numbers if not layout.split_of[number]}
    return layout


class _Level:
    """The folders at one depth, all below the same path."""

    def __init__(self, folders: Sequence[Folder], depth: int) -> None:
        self.path = folders[0][:depth] if folders else ()
        self.has_loose_images = any(len(folder) == depth for folder in folders)
        self.children: dict[str, set[str]] = {}
        for folder in folders:
            if len(folder) > depth:
                names = self.children.setdefault(folder[depth], set())
                names.update(folder[depth + 1 : depth + 2])

    @property
    def is_training_set(self) -> bool:
        """Whether the level is a folder `train` that holds more than splits."""
        return (
            bool(self.path)
            and _is_train(self.path[-1])
            and (self.children.keys() - split_folders(self.children).keys() != set())
        )

    def splits(self) -> dict[str, str]:
        """Return the splits that the folders declare, {} if they declare none."""
        if self.is_training_set:
            return {}
        if len(self.children) == 1 and self.has_loose_images:
            return {name: "train" for name in self.children if _is_train(name)}
        return split_folders(self.children)

    def check(self, source: str, splits: dict[str, str]) -> None:
        """Raise DataError if folders with split names may be classes, like their neighbours."""
        others = self.children.keys() - splits.keys()
        if splits and len(others) > 1 and not any(self.children.values()):
            raise DataError(
                f"--data '{source}': {_listed(splits)} may be splits, or classes as {_listed(others)} may be.\n"
                "If they are classes, move all class folders into one folder 'train'; if they are splits, move the "
                "other folders away."
            )


def _mask_folders(folders: Sequence[Folder]) -> set[int]:
    """Return the numbers of the folders that are a folder of masks, or lie in one (rule 1)."""
    children: dict[Folder, set[str]] = {}
    for folder in folders:
        for depth in range(min(len(folder) + 1, 4)):
            # "" stands for images that lie directly in the folder
            children.setdefault(folder[:depth], set()).add(_at(folder, depth).lower())
    masks = {path: {name for name in names if _is_mask_of(name, names)} for path, names in children.items()}
    return {
        number
        for number, folder in enumerate(folders)
        if any(folder[depth].lower() in masks.get(folder[:depth], ()) for depth in range(len(folder)))
    }


def _is_mask_of(name: str, names: set[str]) -> bool:
    """Return whether a folder contains the masks of a neighbouring folder, given the names of all of them."""
    if name in _MASKS:
        images = IMAGE_FOLDERS | {"data"}  # "data" next to masks only: FiftyOne
        return names <= images | _MASKS and bool(names & images)
    split, kind = _split_and_kind(name)
    return kind in _MASKS and any(_split_and_kind(other) in {(split, image) for image in _IMAGES} for other in names)


def _split_and_kind(name: str) -> tuple[str, str]:
    """Return the split and the rest of names such as "train_masks" and "trainannot", ("", "") for others."""
    for word in _MASKS:
        if name.endswith(word) and is_split_folder(name.removesuffix(word)):
            return split_of_name(name.removesuffix(word)) or "", word
    return split_and_rest(name) or ("", "")


def _wrappers(folders: Iterable[Folder], start: int = 0) -> list[str]:
    """Return the names of the folders below depth `start` that have no image and no other folder next to them."""
    remaining, names = list(folders), list[str]()
    while remaining:
        tops = {_at(folder, start + len(names)) for folder in remaining}
        if len(tops) != 1 or "" in tops:
            break
        names.append(tops.pop())
    return names


def _splits_of_classes(source: str, level: _Level) -> dict[str, dict[str, str]]:
    """Return the splits that each folder declares itself; {} if none does. Raises DataError if only some of them do."""
    inner = {name: split_folders(names) for name, names in level.children.items()}
    nested = [name for name, names in inner.items() if names]
    if nested and (len(nested) < len(inner) or level.has_loose_images):
        raise DataError(
            f"--data '{source}': {_listed(inner[nested[0]])} inside '{nested[0]}' look like splits, but there are "
            f"images beside that folder.\nGive --data '{source}/{'/'.join((*level.path, nested[0]))}'."
        )
    return inner if nested else {}


def _check_folds(source: str, folders: Sequence[Folder], depth: int, inner: dict[str, dict[str, str]]) -> None:
    """Raise DataError if folders with their own splits also have the same classes, as cross-validation folds do."""
    classes: dict[str, set[str]] = {}
    for folder in folders:
        if inner[folder[depth]].get(_at(folder, depth + 1)) == "train":
            classes.setdefault(folder[depth], set()).update(folder[depth + 2 : depth + 3])
    first, *others = classes
    for name in others:
        if len(classes[first] & classes[name]) > 1:
            raise DataError(
                f"--data '{source}': '{first}' and '{name}' hold splits of the same classes.\n"
                f"Give one of them: --data '{source}/{'/'.join((*folders[0][:depth], first))}'."
            )


def _read_classes(layout: Layout, folders: Sequence[Folder], depth: int) -> None:
    """Set the classes of all splits: the names of the folders at `depth`, or below that if there are wrappers."""
    of_split = {split: [n for n, name in enumerate(layout.split_of) if name == split] for split in set(layout.split_of)}
    of_split.pop("", None)
    train = of_split.pop("train", [])
    wrappers = _wrappers((folders[number] for number in train), depth)
    names = {_at(folders[number], depth + len(wrappers)) for number in train} - {""}
    if wrappers and not names:
        layout.only_folder = wrappers[-1]
    for number in train:
        layout.class_of[number] = _at(folders[number], depth + len(wrappers)) or None
    for numbers in of_split.values():
        start = depth
        for name in _wrappers((folders[number] for number in numbers), depth):
            if name in names or not (name in wrappers or name.lower() in IMAGE_FOLDERS or split_of_name(name)):
                break
            start += 1
        for number in numbers:
            layout.class_of[number] = _at(folders[number], start) or None


def _notes_on_classes(source: str, level: _Level) -> tuple[str, ...]:
    """Return notes on classes with the name of a split. Raises DataError if such a folder looks like a split."""
    if len(level.children) < 2:
        return ()
    named = [name for name in sorted(level.children) if is_split_folder(name)]
    if not named:
        inner = list(level.children.values())
        is_telling = len(inner[0]) > 1 or any(map(is_split_folder, inner[0]))  # class/images is usual
        if not is_telling or any(names != inner[0] for names in inner):
            return ()
        return (f"{_listed(level.children)}: taken for classes, though each of them holds {_listed(inner[0])}.",)
    for name in named:
        others = {other: children for other, children in level.children.items() if other != name}
        is_split = level.children[name] & others.keys() or (
            len(others) == 1 and len(level.children[name]) > 1 and level.children[name] & next(iter(others.values()))
        )
        if is_split:
            raise DataError(
                f"--data '{source}': '{name}' looks like a split, because it has class folders as its neighbours do, "
                f"but the folders beside it are {_listed(others)}.\n"
                "Use the names train and val, or move all class folders into one folder 'train'."
            )
    kind = "classes" if len(named) > 1 else "a class"
    return (f"{_listed(named)}: taken for {kind}, as the folders beside do not name training and held-out images.",)


def _is_train(name: str) -> bool:
    return is_split_folder(name) and split_of_name(name) == "train"


def _at(folder: Folder, depth: int) -> str:
    return folder[depth] if len(folder) > depth else ""


def _listed(names: Iterable[str]) -> str:
    return some_of((f"'{name}'" for name in sorted(names)), 4)


def parts_of(layout: Layout, store: Store, folder_of: npt.NDArray[Any]) -> dict[str, Part]:
    """Return the splits of a store whose images lie in the folders of a layout.

    Args:
        layout: what the folders mean.
        store: the images.
        folder_of: the number of the folder of each image.
    """
    parts = {}
    class_of = [name and one_form(name) for name in layout.class_of]
    for split in sorted(set(layout.split_of) - {""}):
        in_split = [name == split for name in layout.split_of]
        rows = np.flatnonzero(np.array(in_split)[folder_of])
        names = tuple(sorted({name for name, is_used in zip(class_of, in_split, strict=True) if is_used and name}))
        code_of: dict[str | None, int] = {name: code for code, name in enumerate(names)}
        codes = np.array([code_of.get(name, -1) for name in class_of], dtype=np.int64)
        labels = Labels(codes[folder_of[rows]], names) if names else None
        unlabelled = "" if labels else _reason(layout, split, store.identify(int(rows[0])), store.unit)
        parts[split] = Part(store, rows, labels, unlabelled, "lie outside the class folders")
    return parts


def count_unused(layout: Layout, folder_of: npt.NDArray[Any]) -> Counter[str]:
    """Return why images in folders of a layout are not used, and how many there are."""
    counts, unused = np.bincount(folder_of, minlength=len(layout.split_of)).tolist(), Counter[str]()
    for number in sorted(layout.reason_of):
        unused[layout.reason_of[number]] += counts[number]
    return unused


def _reason(layout: Layout, split: str, image: str, unit: str) -> str:
    """Return why a split has no class folders, given the name of one of its images (or clips)."""
    if _IMAGENET_NAME.fullmatch(image.rpartition("/")[2]):
        return (
            f"ImageNet's images of {split} come without class folders ({image}); move those of val into class folders "
            "by the list that belongs to them (LOC_val_solution.csv), or use 'hf:ILSVRC/imagenet-1k'"
        )
    if split == "train":
        only = layout.only_folder
        if not only or split_of_name(only) is not None:
            return ""
        is_class = len(set(layout.split_of) - {""}) > 1 and only.lower() not in IMAGE_FOLDERS
        if is_class:
            return Note(f"all its {unit} lie in the one class folder '{only}'", "one class")
        return f"all its {unit} lie in the one folder '{only}'"
    return (
        f"the {unit} of {split} lie in no class folder ({image}); move each into the folder of its class, or give the "
        "training folder alone, of which 10% are then held out"
    )
