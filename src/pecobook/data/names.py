"""What file and folder names say: the splits, images, masks, and what is not part of the data.

    train         train, training, trainval
    validation    val, valid, validation, dev, eval, evaluation
    test          test, testing

These split names apply to every kind of source: folders, parquet files, tar shards, the hub, masks and boxes. Case does
not matter, and "set" may follow: "training_set", "testset". Only a whole word declares a split, so
"imagenet_val.parquet", "TrainImages" and "train2017" declare one; "testaccio.tar" and "valencia.parquet" do not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from pecobook.errors import DataError

_JPEG, _PNG, _JPEG_2000 = "jpg jpeg jpe jfif mpo", "png apng", "jp2 j2k jpx jpf jpc j2c"
_OTHERS = "bmp dib gif tif tiff webp ppm pgm pbm pnm pfm avif heic heif npy"
IMAGE_EXTENSIONS = tuple(f"{_JPEG} {_PNG} {_JPEG_2000} {_OTHERS}".split())
VIDEO_EXTENSIONS = ("mp4", "m4v", "mov", "webm", "mkv", "avi", "mpg", "mpeg", "ts", "3gp", "flv", "wmv", "ogv")
IMAGE_FOLDERS = frozenset({"images", "image", "img", "imgs", "jpegimages", "leftimg8bit"})
MASK_FOLDERS = frozenset(
    (
        *("masks", "mask", "annotations", "annotation", "annot", "labels", "label", "gt", "gtfine", "gtcoarse"),
        *("segmentationclass", "segmentationclassraw", "segmentations", "segmentation", "groundtruth"),
    )
)
"""Names of folders that distinguish images from masks, in lower case."""
MASK_ENDINGS = frozenset(["seg", "segmentation", "mask", "masks", "label", "labels", "annotation", "gt", "depth"])
"""Endings of mask names in a tar shard, as in x.seg.png."""
MASK_COLUMNS = ("mask", "annotation", "label", "segmentation", "segmentation_mask", "annotations", "labels", "gt")
IN_FOLDER_OF_MASKS = "in a folder of masks"
BESIDE_ITS_IMAGE = "mask beside its image, such as x_mask.png"
"""The reasons under which a command without masks counts the masks that it leaves out."""
_MASK_WORDS = (b"masks", b"mask", b"segmentation", b"seg", b"groundtruth", b"gt")
_MASK_ENDING = re.compile(b"[_. -](%s)$" % b"|".join(_MASK_WORDS))
_SPLIT_OF_WORD = {
    "train": ("train", "training", "trainval"),
    "validation": ("validation", "valid", "val", "dev", "evaluation", "eval"),
    "test": ("test", "testing"),
}
_SPLITS = {word: split for split, words in _SPLIT_OF_WORD.items() for word in words}
SPLIT_WORDS = tuple(_SPLITS)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_WORD = re.compile(rf"(?<![a-z])({'|'.join(_SPLITS)})(?:[ _-]?set)?(?![a-z])")
# A version of a data set may be called "dev", so these words count only in a name without another one.
_WEAK = frozenset({"dev", "evaluation", "eval"})
_NOT_THE_USERS = frozenset(
    {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)
"""Folders that macOS adds to a zip archive, with a shadow of each file; that network storage adds, with thumbnails; and
those of removed files and of file systems."""
_ABOUT = frozenset({"", ".txt", ".md", ".pdf", ".html", ".rst"})


def is_hidden(name: str) -> bool:
    """Return whether a file or folder name is hidden from users, or does not belong to their data."""
    return (name.startswith(".") and name not in (".", "..")) or name in _NOT_THE_USERS


def refuse_folder(error: OSError) -> NoReturn:
    """Raise DataError for a folder that cannot be listed."""
    raise DataError(
        f"The folder '{os.fsdecode(error.filename)}' cannot be listed: {error.strerror}. Let this user read it, or "
        "move it away."
    ) from error


def split_of_name(name: str) -> str | None:
    """Return the split that a single name declares: "train", "validation", "test" or None."""
    match = split_and_rest(name)
    return match and match[0]


def split_of_path(path: str) -> str | None:
    """Return the split that a relative path declares; the file's name takes precedence over those of its folders."""
    parts = reversed(path.replace("\\", "/").split("/"))
    return next((split for part in parts if (split := split_of_name(part))), None)


def split_folders(names: Iterable[str]) -> dict[str, str]:
    """Return the split of each folder that declares one, given the names of all folders at one level.

    Folders declare splits only together, because one of them may be the class "train" of a set of vehicles: a folder of
    training images and one of validation or test images whose names are equal apart from the split's word, such as
    "train" and "valid", "seg_train" and "seg_test", or "train2017" and "val2017". Other folders next to them declare
    nothing. If no two names are equal in this way ("train_1", "train_2", "test"), every folder must name a split.
    """
    all_names = set(names)
    found = {name: match for name in sorted(all_names) if (match := split_and_rest(name))}
    rests: dict[str, set[str]] = {}
    for split, rest in found.values():
        rests.setdefault(rest, set()).add(split)
    complete = {rest for rest, splits in rests.items() if _is_complete(splits)}
    if "" in complete:
        complete = {""}
    if not complete and len(found) == len(all_names) and _is_complete({split for split, _ in found.values()}):
        complete = set(rests)
    return {name: split for name, (split, rest) in found.items() if rest in complete}


def inside_wrapper(root: Path) -> Path:
    """Return the folder that an unpacked archive wraps: the only folder of `root`, unless that declares a split.

    Hidden entries and files about the data, such as a README, are ignored.
    """
    while True:
        entries = [entry for entry in root.iterdir() if not is_hidden(entry.name)]
        folders = [entry for entry in entries if entry.is_dir()]
        others = [entry for entry in entries if entry not in folders and entry.suffix.lower() not in _ABOUT]
        if len(folders) != 1 or others or split_of_name(folders[0].name):
            return root
        root = folders[0]


def is_split_folder(name: str) -> bool:
    """Return whether a name is a split name and nothing else, such as "Training" or "test_set"."""
    match = split_and_rest(name)
    return match is not None and not match[1]


def group_by_split(names: Iterable[str]) -> tuple[dict[str, list[int]], list[int]]:
    """Group the indices of files (or of a data set's splits) into "train", "validation" and "test" by name.

    If no name declares "train", those that declare no split are the training set. If there is still no training file,
    the declared splits are ignored and all files are "train".

    Returns:
        the indices of each split, and the indices that declare no split although others do: these are not used.
    """
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        groups.setdefault(split_of_path(name) or "", []).append(number)
    undeclared = groups.pop("", [])
    if "train" in groups:
        return groups, undeclared
    if undeclared:
        return {**groups, "train": undeclared}, []
    return {"train": sorted(number for numbers in groups.values() for number in numbers)}, []


def note_ignored_splits(names: Sequence[str], groups: Collection[str]) -> tuple[str, ...]:
    """Return a note if names declare splits that are ignored, given the splits that are used."""
    declared = [name for name in names if split_of_path(name) not in (None, "train")]
    if not declared or len(groups) > 1:
        return ()
    more = f" and {len(declared) - 1} more" if len(declared) > 1 else ""
    return (f"Nothing is named train beside '{declared[0]}'{more}: all images are for training, but those held out.",)


def _is_complete(splits: set[str]) -> bool:
    return "train" in splits and len(splits) > 1


def split_and_rest(name: str) -> tuple[str, str] | None:
    """Return the split that a name declares, and the name without the split's word; None if it declares no split."""
    lower = _CAMEL.sub("_", name).lower()
    matches = list(_WORD.finditer(lower))
    if not matches:
        return None
    match = next((match for match in matches if match[1] not in _WEAK), matches[0])
    return _SPLITS[match[1]], (lower[: match.start()] + lower[match.end() :]).strip(" _-.")


def masks_among(names: list[bytes]) -> set[bytes]:
    """Return names such as "x_mask.png" or "x_mask_1.png" of files next to "x.jpg", given all files of a folder."""

    def stem(name: bytes) -> bytes:
        return name.rpartition(b".")[0].lower()

    masks = {name: end for name in names if _MASK_ENDING.search(end := stem(name).rstrip(b"_0123456789"))}
    if not masks:
        return set()
    images = set(map(stem, names))
    return {name for name, end in masks.items() if _MASK_ENDING.sub(b"", end) in images}
