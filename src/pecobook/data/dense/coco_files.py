"""Finds the annotation and image files of a data set in COCO's format, in the layouts that tools write."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize
from urllib.parse import unquote

from pecobook.data.dense.coco_values import UnusableError
from pecobook.data.names import IMAGE_EXTENSIONS, inside_wrapper, split_of_name, split_of_path

_FILES = ("instances.json", "_annotations.coco.json", "annotations.json", "labels.json", "result.json")
_IMAGE_FOLDERS = ("images", "data", "img")
_ANNOTATION_FOLDERS = ("annotations", "annotation", "labels", "json")
_OTHER_TASKS = ("captions_", "person_keypoints_", "image_info_", "panoptic_", "stuff_")
_SAMPLE = 50

AnnotationFiles = dict[str, list[tuple[Path, list[Path]]]]
"""Split -> its annotation files, each with the folders that may contain its images."""
_Found = Iterator[tuple[str, Path, list[Path]]]


def find_annotations(root: Path) -> AnnotationFiles:
    """Find a data set's annotation files; an archive may have added one more folder around it."""
    for folder in dict.fromkeys((root, inside_wrapper(root))):
        for find in (_in_split_folders, _in_annotations, _at_the_top):
            found: AnnotationFiles = {}
            for split, file, image_folders in find(folder):
                found.setdefault(split, []).append((file, image_folders))
            if found:
                return found
    return {}


def stray_annotations(root: Path) -> Path | None:
    """Return a file that looks like COCO's format, anywhere below a folder; None if there is none."""
    files = (file for folder in _below(root, None) for file in _json_files(folder)[:_SAMPLE])
    return next((file for file in files if looks_like_coco(file)), None)


def other_format(root: Path) -> str:
    """Return the format of annotations in a folder that are not supported; empty if there are none."""
    folders = [(Path(top), names) for top, _, names in itertools.islice(os.walk(root), _SAMPLE)]
    if any("annotations.xml" in names for _, names in folders):
        return "CVAT's XML (CVAT also exports COCO 1.0)"
    if any("samples.json" in names for _, names in folders):
        return "FiftyOne's own files (FiftyOne also exports COCODetectionDataset)"
    per_image = ((".xml", 1, "Pascal VOC's XML"), (".json", 2, "JSON files for each image, as of labelme,"))
    for ending, least, kind in per_image:
        if any(sum(name.endswith(ending) for name in names) >= max(len(names) / 2 - 1, least) for _, names in folders):
            return kind
    is_yolo = any(top.name == "labels" or top.parent.name == "labels" for top, names in folders if _num_texts(names))
    return "YOLO's text files" if is_yolo or any(_num_texts(names) > len(names) / 3 for _, names in folders) else ""


def _num_texts(names: list[str]) -> int:
    return sum(name.endswith(".txt") for name in names)


def _in_split_folders(root: Path) -> _Found:
    """Find train/instances.json, train/annotations/instances.json and the like."""
    for folder in _folders(root):
        if split := split_of_name(folder.name):
            files = _files_in(folder) or [file for inner in _annotation_folders(folder) for file in _files_in(inner)]
            yield from ((split, file, _image_folders(folder)) for file in files)


def _in_annotations(root: Path) -> _Found:
    """Find annotations/instances_train2017.json (COCO), instances_default.json (CVAT), annotations/train/*.json."""
    for folder in _annotation_folders(root):
        files = [file for file in _json_files(folder) if not file.name.startswith(_OTHER_TASKS)]
        files = [file for file in files if file.name.startswith("instances_")] or files
        for file in files or [file for file in _json_files(folder) if file.name.startswith("person_keypoints_")]:
            name = file.stem.removeprefix("instances_").removeprefix("person_keypoints_")
            split = split_of_name(name) or "train"
            yield split, file, _folders_of_split(root, name, split)
        for inner in _folders(folder):
            if split_of_inner := split_of_name(inner.name):
                folders = _folders_of_split(root, inner.name, split_of_inner)
                yield from ((split_of_inner, file, folders) for file in _files_in(inner))


def _at_the_top(root: Path) -> _Found:
    """Find one file next to the images, or train.json and val.json."""
    files = _known_files(root)
    named = [] if files else [(split, file) for file in _json_files(root) if (split := split_of_name(file.stem))]
    yield from ((split, file, _folders_of_split(root, file.stem, split)) for split, file in named)
    yield from (("train", file, _image_folders(root)) for file in files or ([] if named else _files_in(root)))


def _folders(root: Path) -> list[Path]:
    with os.scandir(root) as entries:
        return sorted(Path(entry) for entry in entries if entry.is_dir())


def _annotation_folders(root: Path) -> list[Path]:
    return [folder for folder in _folders(root) if folder.name.lower() in _ANNOTATION_FOLDERS]


def _json_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() == ".json" and path.is_file())


def _known_files(folder: Path) -> list[Path]:
    return [folder / name for name in _FILES if (folder / name).is_file()]


def _files_in(folder: Path) -> list[Path]:
    """Return the annotation files in a folder; one with another name is used if no other JSON file is COCO's."""
    others = _json_files(folder)
    others = others if len(others) == 1 else [file for file in others[:_SAMPLE] if looks_like_coco(file)]
    return _known_files(folder) or (others if len(others) == 1 else [])


def looks_like_coco(file: Path) -> bool:
    """Return whether the beginning of a JSON file looks like COCO's format."""
    with file.open("rb") as stream:
        start = stream.read(65_536)
    return any(word in start for word in (b'"images"', b'"annotations"', b'"categories"'))


def _image_folders(folder: Path) -> list[Path]:
    inner = {path.name.lower(): path for path in _folders(folder)}
    return [*(inner[name] for name in _IMAGE_FOLDERS if name in inner), folder]


def _folders_of_split(root: Path, name: str, split: str) -> list[Path]:
    """Return the folders that may contain a split's images: NAME/, images/NAME/, images/train/, images/, ..."""
    parents = [root, *(path for path in _image_folders(root) if path != root)]
    inner = [path for parent in parents for path in _folders(parent)]
    folders = [path for path in inner if path.name == name]
    folders += [path for path in inner if split_of_name(path.name) == split]
    folders += [path for path in inner if path.name == "default"]
    within = [part for path in folders for part in _image_folders(path) if part != path]
    return list(dict.fromkeys([*folders, *within, *_image_folders(root)]))


def count_unnamed(named: set[Path]) -> int:
    """Return the number of image files in the folders of the named files that are not named themselves."""
    return sum(
        Path(entry.name).suffix[1:].lower() in IMAGE_EXTENSIONS and folder / entry.name not in named
        for folder in {path.parent for path in named}
        if folder.is_dir()
        for entry in os.scandir(folder)
    )


def file_name(image: Any) -> str:
    """Return the name of an image's file in its entry; LVIS states only the URL, which ends with it."""
    if not isinstance(image, dict):
        return ""
    name, address = image.get("file_name"), image.get("coco_url")
    if name is None and isinstance(address, str):
        name = "/".join(address.split("/")[-2:])
    return name if isinstance(name, str) else ""


def _below(root: Path, split: str | None) -> Iterator[Path]:
    """Yield up to a few thousand folders below a root, without those that declare another split."""
    for top, _, _ in itertools.islice(os.walk(root), 1000):
        if split is None or split_of_path(os.path.relpath(top, root)) in (None, split):
            yield Path(top)


def _spellings(name: str) -> Iterable[str]:
    """Return a name as it is and as other systems write it: URLs, accents, Label Studio's uploads."""
    address = name.partition("?d=")[2] or (name.partition("?")[0] if "://" in name else name)
    plain = unquote(address)
    uploaded = re.sub(r"(^|[/\\])[0-9a-f]{8}-(?=[^/\\]+$)", r"\1", plain)  # Label Studio's prefix of an upload
    forms = (normalize("NFC", plain), normalize("NFD", plain))  # NFD is macOS's for accents
    return dict.fromkeys((name, address, plain, *forms, uploaded))


def _folded(path: str) -> str:
    """Return a file name without what other systems change: upper case and spaces."""
    return Path(path).name.lower().replace(" ", "_")


class ImageFiles:
    """The image files that an annotation file names.

    Attributes:
        root: folder of the images.
    """

    def __init__(self, file: Path, folders: Sequence[Path], images: Sequence[Any]) -> None:
        self._file, self._listings = file, dict[Path, set[str]]()
        self._found: set[str] = set()
        names = [name for image in images[:_SAMPLE] if (name := file_name(image))]
        self.root = max(folders, key=lambda folder: self._count(folder, names, 1))
        if not self._count(self.root, names, None):  # images/ has another name, or lies deeper
            split = split_of_path(f"{file.parent.name}/{file.name}")
            others = list(_below(folders[-1], split)) or [self.root]
            best = max(others, key=lambda folder: self._count(folder, names, None))
            self.root = best if self._count(best, names, None) else self.root

    def _count(self, folder: Path, names: list[str], tries: int | None) -> int:
        return sum(bool(self._locate(folder, name, tries)) for name in names)

    def find(self, name: str) -> str:
        """Return the path of an image relative to `root`.

        A name may have backslashes, and leading folders that do not exist here, as on the machine that wrote it.

        Raises:
            UnusableError: there is no such file, or another image of the annotations has the same one.
        """
        path = self._locate(self.root, name, None)
        if not path:
            raise UnusableError(f"'{name}' is not in {self.root}{self._similar(name)}", "images that are missing")
        if path in self._found:
            raise UnusableError(f"'{name}' is the file of another image too: {path}", "images that cannot be used")
        self._found.add(path)
        return path

    def _locate(self, root: Path, name: str, tries: int | None) -> str:
        paths = [name]
        for spelling in _spellings(name):
            parts = [part for part in spelling.replace("\\", "/").split("/") if part not in ("", ".", "..")]
            paths += ["/".join(parts[start:]) for start in range(len(parts))]
        for path in paths[:tries]:
            if Path(path).name in self._listing((root / path).parent):
                return path
        for path in paths if tries is None else ():  # written on a system that ignores case
            alike = [other for other in self._listing((root / path).parent) if _folded(other) == _folded(path)]
            if len(alike) == 1:
                return str(Path(path).with_name(alike[0]))
        return ""

    def _similar(self, name: str) -> str:
        """Return a note on a file called `name` except for its extension; empty if there is none."""
        path = Path(name.replace("\\", "/"))
        others = self._listing((self.root / path).parent) or self._listing(self.root)
        other = next((other for other in sorted(others) if Path(other).stem in (path.stem, path.name)), None)
        return f", but '{other}' is" if other else ""

    def _listing(self, folder: Path) -> set[str]:
        """Return the names of the files in a folder, without pipes and devices, which have no end."""
        if folder not in self._listings:
            try:
                with os.scandir(folder) as entries:
                    self._listings[folder] = {entry.name for entry in entries if entry.is_file()}
            except OSError:
                self._listings[folder] = set()
        return self._listings[folder]
