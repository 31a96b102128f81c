"""Finds the pairs of an image file and a mask file in a folder.

Folders named images/, masks/ or similar distinguish images from masks ("train_masks/" is the mask folder of "train/").
If there are none, a word within a folder's name does (binary_masks/, SegmentationClassPNG/), or the endings of the file
names: x.jpg and x_mask.png. Pictures are paired by their relative paths; if no paths agree, by file name, or by file
name without the words that all images, or all masks, of a folder share: img_1.jpg and lbl_1.png.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import TypeAlias
from unicodedata import normalize

from pecobook.data.names import (
    IMAGE_EXTENSIONS,
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    SPLIT_WORDS,
    is_hidden,
    refuse_folder,
    split_of_name,
)
from pecobook.errors import DataError, listed

_KindOf: TypeAlias = Callable[[tuple[str, ...]], tuple[str, tuple[str, ...]]]
_SPLIT_AND_KIND = re.compile(rf"({'|'.join(SPLIT_WORDS)})(annot|masks?|labels?|images?)")
_MASK_ENDING = re.compile(
    r"[ _.-](masks?|labels?|seg|segmentation|segmentations|annotation|groundtruth|ground_truth|gt|l"
    r"|(gtfine_|gtcoarse_)?label(train)?ids)$",
    re.IGNORECASE,
)
_MASK_BEGINNING = re.compile(r"(^|/)(masks?|labels?|seg|gt)[ _.-](?=[^/]*$)", re.IGNORECASE)
_IMAGE_ENDING = re.compile(r"[ _.-](leftimg8bit|images?|img|sat|0000)$", re.IGNORECASE)
_OTHER_ENDING = re.compile(r"[_-](gtfine_|gtcoarse_)?(colou?rs?|instance(train)?ids)$", re.IGNORECASE)
_MASK_WORDS = MASK_FOLDERS | {"seg", "segs", "trimap", "trimaps", "matte", "mattes"}
_VOC_LISTS = {"train": "train", "val": "validation"}


@dataclasses.dataclass
class Pictures:
    """The pictures of a folder, by key: the relative path without the folder's kind and without the extension."""

    images: dict[str, str] = dataclasses.field(default_factory=dict)
    masks: dict[str, str] = dataclasses.field(default_factory=dict)
    others: dict[str, str] = dataclasses.field(default_factory=dict)
    """Pictures in folders of neither kind."""
    extensions: Counter[str] = dataclasses.field(default_factory=Counter)
    """Extension -> number of files in folders of images or masks that are not pictures."""
    duplicates: list[str] = dataclasses.field(default_factory=list)

    def by_file_name(self) -> Pictures | None:
        """Return the pictures by file name only; None where two images or two masks share one."""
        kinds = [{key.rpartition("/")[2]: file for key, file in files.items()} for files in (self.images, self.masks)]
        is_unique = [len(kinds[0]), len(kinds[1])] == [len(self.images), len(self.masks)]
        return dataclasses.replace(self, images=kinds[0], masks=kinds[1]) if is_unique else None

    def by_own_words(self) -> Pictures:
        """Return the pictures by their names without the words that the files of a folder share, such as "_lbl"."""
        images, masks = _without_shared_words(self.images), _without_shared_words(self.masks)
        return dataclasses.replace(self, images=images, masks=masks)

    def add(self, kind: str, key: str, file: str) -> None:
        """Add a picture; kind is "images", "masks" or "others"."""
        pictures = getattr(self, kind)
        if kind != "others" and key in pictures:
            self.duplicates.append(f"{pictures[key]} and {file} have the same name")
        pictures[key] = file


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs of relative paths, and what belongs to no pair."""

    pairs: list[tuple[str, str]]
    unpaired: list[str]
    """A line for each image without a mask and each mask without an image."""
    left_out: dict[str, int]
    """Reason -> number of files that are not used."""
    splits: tuple[str, ...] | None = None
    """The split of each pair; None if the names of its folders declare it."""


def find_pairs(data: str, root: Path) -> Pairs:
    """Find all pairs of images and masks under a folder.

    Raises:
        DataError: there are no images or no masks, or two pictures have the same name.
    """
    folders = _folders(root)
    found = _pictures(folders, _kind_of_folder)
    if not found.masks:
        found = by_words if (by_words := _pictures(folders, _kind_by_words)).masks else found
    has_images = bool(found.images)
    if found.masks and not has_images:  # train/ and train_masks/
        # FiftyOne's images lie in data/.
        found.images = {re.sub("(^|/)data/", r"\1", key): file for key, file in found.others.items()}
        found.others = {}
    elif not found.masks and (found.images or found.others):  # x.jpg and x_mask.png in one folder
        pictures = found.images or found.others
        known = {name.lower() for key in pictures for name in (key, _IMAGE_ENDING.sub("", key))}
        masks = {key for key in pictures if any(base != key.lower() and base in known for base in mask_bases(key))}
        found.masks = {key: pictures[key] for key in masks}
        found.images = {key: file for key, file in pictures.items() if key not in masks}
        found.others = {} if pictures is found.others else found.others
    if not found.images or not found.masks:
        _refuse(data, found)
    if found.duplicates:
        raise DataError(
            f"--data '{data}':\n{listed(found.duplicates)}\nImages and masks are paired by name: keep one file."
        )
    result = _match(data, found)
    for named in (found.by_file_name(), found.by_own_words() if has_images else None):
        if not result.pairs and named:
            result = by_name if (by_name := _match(data, named)).pairs else result
    if not (result.pairs or has_images):
        found.images = {}
        _refuse(data, found)
    return _listed_by_voc(root, result)


def _listed_by_voc(root: Path, found: Pairs) -> Pairs:
    """Return the pairs that the lists of Pascal VOC name, with their splits; all pairs if there are no such lists."""
    folder = next((f for depth in ("", "*/", "*/*/") for f in root.glob(f"{depth}ImageSets/Segmentation")), None)
    files = {split: folder / f"{name}.txt" for name, split in _VOC_LISTS.items()} if folder else {}
    if not files or not all(file.is_file() for file in files.values()):
        return found
    split_of = {name: split for split, file in files.items() for name in file.read_text().split()}
    pairs = [pair for pair in found.pairs if Path(pair[0]).stem in split_of]
    unpaired = [line for line in found.unpaired if Path(line.partition(" has no ")[0]).stem in split_of]
    num_images = sum(line.endswith("has no mask") for line in unpaired)
    before = found.left_out.get("images without a mask", 0)
    unlisted = before - num_images + len(found.pairs) - len(pairs)
    left_out = {**found.left_out, "images without a mask": num_images, "images that ImageSets does not list": unlisted}
    return Pairs(pairs, unpaired, dict(+Counter(left_out)), tuple(split_of[Path(image).stem] for image, _ in pairs))


def _refuse(data: str, found: Pictures) -> None:
    missing = "images" if not found.images else "masks"
    kinds = (+found.extensions).most_common(3)
    ignored = ", ".join(f"{count:,} files .{extension}" for extension, count in kinds)
    raise DataError(
        f"--data '{data}' holds no {missing}: it needs images/ and masks/ (or annotations/), either at the top, or "
        "under train/ and val/, or with the subfolders training/ and validation/."
        + (f" Not read: {ignored}; save masks as PNG." if ignored else "")
    )


def _folders(root: Path) -> list[tuple[tuple[str, ...], list[str]]]:
    """List the folders below a root and their files. Links to folders are followed; each folder is visited once."""
    folders = []
    visited: set[str] = set()
    for top, subfolders, names in os.walk(root, onerror=refuse_folder, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not (is_hidden(name) or name.startswith("ImageSets")))
        real_path = os.path.realpath(top)
        if real_path in visited:
            subfolders.clear()  # a link to a folder that was visited already
            continue
        visited.add(real_path)
        files = [name for name in sorted(names) if not name.startswith(".") and (Path(top) / name).is_file()]
        folders.append((Path(top).relative_to(root).parts, files))
    return folders


def _pictures(folders: Iterable[tuple[tuple[str, ...], list[str]]], kind_of: _KindOf) -> Pictures:
    """Sort the pictures of some folders by what `kind_of` says that a folder holds."""
    found = Pictures()
    for parts, names in folders:
        kind, key_parts = kind_of(parts)
        for name in names:
            stem, _, extension = name.rpartition(".")
            if stem and extension.lower() not in IMAGE_EXTENSIONS:
                found.extensions[extension.lower()] += kind != "others"
            elif stem:
                key = normalize("NFC", "/".join((*key_parts, stem)))  # macOS writes accents differently
                found.add(kind, key, "/".join((*parts, name)))
    return found


def _kind_of_folder(parts: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return what a folder holds, and its path without the word that says so."""
    for position, part in enumerate(parts):
        for kind, words in (("images", IMAGE_FOLDERS), ("masks", MASK_FOLDERS)):
            rest = _without_word(part.lower(), words)
            if rest is not None:
                return kind, (*parts[:position], *([rest] if rest else []), *parts[position + 1 :])
    return "others", parts


def _kind_by_words(parts: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Return what a folder holds by the words within its name, such as "binary_masks", and its path without that name.

    A word ends at a space, a mark or a capital letter.
    """
    for position, part in enumerate(parts):
        words = _words(part)
        for kind, known in (("masks", _MASK_WORDS), ("images", IMAGE_FOLDERS)):
            if words & known:
                return kind, (*parts[:position], *parts[position + 1 :])
    return "others", parts


def _words(name: str) -> set[str]:
    split = re.sub("(?<=[a-z])(?=[A-Z])", " ", name)  # "SegmentationClass"
    return {word for text in (name, split) for word in re.split(r"[ _.-]+", text.lower())}


def names_masks(folder: str) -> bool:
    """Return whether a folder's name contains a word for folders of masks."""
    return bool(_words(folder) & _MASK_WORDS)


def masks_among_classes(classes: Mapping[str, Sequence[str]]) -> str:
    """Return the name of a class that seems to hold the masks of the images of other classes, or an empty text.

    Args:
        classes: name of the class -> names of its files.
    """
    stems = {name: {PurePath(file).stem.lower() for file in files} for name, files in classes.items()}
    for name, own in stems.items():
        if names_masks(name):
            images = {stem for other, theirs in stems.items() if other != name for stem in theirs}
            if 2 * sum(any(base in images for base in mask_bases(stem)) for stem in own) > len(own):
                return name
    return ""


def _without_word(name: str, words: frozenset[str]) -> str | None:
    """Return what is left of a folder's name, such as "train" of "train_masks"; None if it has none of the words."""
    match = _SPLIT_AND_KIND.fullmatch(name)
    if match:
        return match[1] if match[2] in words else None
    if name in words:
        return ""
    tokens = re.split(r"[ _-]+", name)
    if len(tokens) == 2 and (tokens[0] in words) != (tokens[1] in words):
        rest = tokens[1] if tokens[0] in words else tokens[0]
        return rest if split_of_name(rest) or rest.isdigit() else None
    return None


def _without_shared_words(files: Mapping[str, str]) -> dict[str, str]:
    """Return files by their keys without the words that all names of a folder begin or end with."""
    folders: dict[str, list[str]] = {}
    for key in files:
        folders.setdefault(key.rpartition("/")[0], []).append(key.rpartition("/")[2])
    result = {}
    for folder, names in folders.items():
        start, end = _length_of_shared_words(names), _length_of_shared_words([name[::-1] for name in names])
        for name in names:
            own = name[start : max(len(name) - end, start)].lower()
            result[f"{folder}/{own}".lstrip("/")] = files[f"{folder}/{name}".lstrip("/")]
    return result


def _length_of_shared_words(names: Sequence[str]) -> int:
    """Return the number of characters in the words that all of two or more names begin with."""
    first, last = min(names), max(names)
    length = next((number for number, pair in enumerate(zip(first, last, strict=False)) if len({*pair}) > 1), 0)
    return len(re.sub(r"[^ _.-]*$", "", first[:length]))


def _match(data: str, found: Pictures) -> Pairs:
    """Pair images and masks: by equal names first, then by names without endings such as _mask or _leftImg8bit."""
    pairs = [(found.images[key], found.masks[key]) for key in sorted(found.images.keys() & found.masks.keys())]
    images = {key: file for key, file in found.images.items() if key not in found.masks}
    masks = {key: file for key, file in found.masks.items() if key not in found.images}
    image_of: dict[str, str] = {}
    for key in sorted(images, reverse=True):
        image_of[_IMAGE_ENDING.sub("", key).lower()] = key
    image_of |= {key.lower(): key for key in images}
    masks_of: dict[str, list[str]] = {}
    others = []
    for key in sorted(masks):
        base = next((base for base in mask_bases(key) if base in image_of), None)
        if base is not None:
            masks_of.setdefault(image_of[base], []).append(key)
        elif _OTHER_ENDING.search(key) and _OTHER_ENDING.sub("", key).lower() in image_of:
            others.append(key)
    for image, names in sorted(masks_of.items()):
        # Cityscapes' own conversion writes labelTrainIds next to labelIds, for training.
        names.sort(key=lambda name: ("trainids" not in name.lower(), name))
        if len(names) > 1 and "trainids" not in names[0].lower():
            raise DataError(
                f"--data '{data}': {images[image]} has two masks, {masks[names[0]]} and {masks[names[1]]}: keep one."
            )
        pairs.append((images.pop(image), masks.pop(names[0])))
        others += names[1:]
    for key in others:
        del masks[key]
    unpaired = [f"{file} has no mask" for file in images.values()] + [f"{file} has no image" for file in masks.values()]
    left_out = {
        "images without a mask": len(images),
        "masks without an image": len(masks),
        "masks of another kind": len(others),
        "pictures in no folder of images or masks": len(found.others),
        **{f"extension .{extension}": count for extension, count in found.extensions.items()},
    }
    return Pairs(sorted(pairs), sorted(unpaired), dict(+Counter(left_out)))


def mask_bases(key: str) -> Iterable[str]:
    """Yield the names, in lower case, that the image of a mask may have."""
    shorter = re.sub(rf"\.({'|'.join(IMAGE_EXTENSIONS)})$", "", key, flags=re.IGNORECASE)  # x.jpg.png
    for name in dict.fromkeys((key, shorter, _MASK_ENDING.sub("", shorter), _MASK_BEGINNING.sub(r"\1", shorter))):
        yield name.lower()
