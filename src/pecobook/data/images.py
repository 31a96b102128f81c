"""Opens the image source of `--data SOURCE` as a training split and an evaluation split.

    folder of images    folders.py     any depth; class subfolders give labels; train/ and test/ give splits
    parquet             tables.py      a file or a folder; column `image`, optional `label`
    hf:owner/name       tables.py      a data set of the Hugging Face hub
    tar shards          shards.py      WebDataset
    s3://, https://     remote.py      tar shards or parquet on other machines, also gs:// and hf://
    photos              photos.py      photographs that are installed with scikit-image and scikit-learn

The module of each form returns `Contents` (see parts.py), which `assemble` turns into `Splits`. Images
are decoded only when they are read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from pecobook.data.decode import BadImage, decode, read_file
from pecobook.data.deep import ValueRange
from pecobook.data.parts import Contents, Part, assemble
from pecobook.data.remote import is_remote, list_remote
from pecobook.data.source import ImageSource, Splits, release_memory
from pecobook.data.views import center_crop
from pecobook.errors import DataError, did_you_mean
from pecobook.utils.files import write_atomically
from pecobook.utils.given import given
from pecobook.utils.images import fitted_size, resize
from pecobook.utils.printer import say

SOURCE_FORMS = (
    "A source is a folder of images, a parquet file or folder, tar shards ('shards/', 'x-{000..009}.tar'), "
    "'hf:owner/name', tar shards or parquet at s3://, gs://, https:// or hf://, or 'photos' (built in)."
)
_ARCHIVES = frozenset({".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"})


def open_images(source: str) -> Splits:
    """Open an image source of any kind listed at the top of this file.

    The evaluation split is the source's `test` split if there is one, otherwise the `validation` split, otherwise 10%
    of the training images, chosen by a fixed permutation that does not depend on the seed. If both exist, `validation`
    is not used, unless `train` and `validation` have labels and `test` has none (as in ImageNet). Split names are
    case-insensitive.

    Raises:
        DataError: there is no such source, or it contains nothing usable. The message tells the user what to do.
    """
    if source == "photos":
        from pecobook.data.photos import open_photos

        return open_photos()
    splits = assemble(source, _open(source))
    release_memory()
    return splits


def check_readable(source: ImageSource, count: int = 8) -> None:
    """Raise DataError if none of the first `count` images can be read."""
    reasons = []
    for index in range(min(count, len(source))):
        try:
            source.read(index)
        except BadImage as error:
            reasons.append(str(error))
        else:
            return
    raise DataError(
        f"None of the first {len(reasons)} {source.unit} of '{source.name}' can be read; the first: {reasons[0]}."
    )


def has_labels(splits: Splits) -> bool:
    """Return whether training and evaluation images have labels."""
    return splits.train.labels is not None and splits.evaluation.labels is not None


def check_labels(splits: Splits, source: str) -> None:
    """Raise DataError unless training and evaluation images have labels; `source` is the value of `--data`."""
    for images, whose in (
        (splits.train, ""),
        (splits.evaluation, f" for its held-out images ({splits.evaluation_name})"),
    ):
        if images.labels is None and images.unlabelled:
            raise DataError(f"--data '{source}' has no labels that can be used{whose}: {images.unlabelled}.")
        if images.labels is None:
            remedy = "" if images.unit == "clips" else ", or give a parquet file with the columns image and label"
            raise DataError(
                f"--data '{source}' has no labels{whose}: put the {images.unit} of each class in their own subfolder"
                f"{remedy}."
            )


def open_all_splits(source: str) -> list[ImageSource]:
    """Open all images of a source, as one `ImageSource` per declared split, and print what is left out.

    Each has the labels and class names of its own split; the label of an unlabelled image is -1.

    Raises:
        DataError: as for `open_images`.
    """
    if source == "photos":
        splits = open_images(source)
        return [splits.train, splits.evaluation]
    contents = _open(source)
    say_left_out(source, contents.left_out)
    return [_whole(source, name, part) for name, part in contents.parts.items() if len(part.rows)]


def _whole(source: str, split: str, part: Part) -> ImageSource:
    classes, labels = (part.labels.names, part.labels.codes) if part.labels else (None, None)
    return ImageSource(part.store, name=source, split=split, rows=part.rows, classes=classes, labels=labels).map()


def say_left_out(source: str, left_out: Mapping[str, int]) -> None:
    """Print what a source contains besides images, for a command that reads all splits as one."""
    if left_out:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        say(f"Left out of '{source}': {reasons}.")


def _open(source: str) -> Contents:
    if not source:
        raise DataError(f"--data is missing: give a source of images.\n{SOURCE_FORMS}")
    value = given("data", source)
    if value is not None:
        from pecobook.data.given import given_contents

        return given_contents(value, source)
    if source.startswith("hf:") and not is_remote(source):
        from pecobook.data.tables import hub_contents

        return hub_contents(source)
    if is_remote(source):
        return _remote_parts(source)
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            from pecobook.data.folders import folder_contents

            return folder_contents(source, path)
        files = [path] if path.is_file() else expand_pattern(source)
    except (OSError, RuntimeError) as error:  # a name that is too long; the unknown user of "~nobody"
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"--data '{source}' cannot be opened: {reason}.") from error
    return _file_parts(source, files)


def _remote_parts(source: str) -> Contents:
    files, left_out = list_remote(source, _expand_braces)
    contents = _file_parts(source, [*files])
    return replace(contents, left_out=dict(Counter(contents.left_out) + left_out))


def _file_parts(source: str, files: list[Path]) -> Contents:
    extensions = {file.suffix.lower() for file in files}
    if extensions == {".parquet"}:
        from pecobook.data.tables import parquet_contents

        return parquet_contents(source, files)
    if extensions == {".tar"}:
        from pecobook.data.shards import shard_contents

        return shard_contents(source, files)
    if files:
        reason = f"a single '{files[0].suffix}' file is not a source; give the folder that holds the file."
        if files[0].suffix.lower() in _ARCHIVES:
            reason = f"'{files[0].name}' is compressed; unpack it, and give the folder or the .tar files."
        raise DataError(f"--data '{source}': {reason}\n{SOURCE_FORMS}")
    raise DataError(f"--data '{source}': {_missing_reason(source)}\n{SOURCE_FORMS}")


def _missing_reason(source: str) -> str:
    """Name the first part of a path that does not exist, and suggest the most similar existing name."""
    if re.search(r"[*?{\[]", source):
        return "no file matches this pattern."
    missing = Path(source).expanduser()
    if missing.exists():
        return "it is neither a folder nor a regular file."
    while not missing.parent.exists() and missing.parent != missing:
        missing = missing.parent
    try:
        siblings = {path.name: str(path) for path in missing.parent.iterdir()}
    except OSError:
        siblings = {}
    if missing.parent == Path():
        siblings |= {"photos": "photos"}
    suggestion = did_you_mean(missing.name, siblings)
    for name, path in siblings.items():
        suggestion = suggestion.replace(f"'{name}'", f"'{path}'")
    return f"'{missing}' does not exist.{suggestion}"


def expand_pattern(pattern: str) -> list[Path]:
    """Return the files that match a pattern with `{000..009}`, `{a,b}`, `*`, `?` or `[...]`, in order.

    Raises:
        DataError: some of the files that the braces list do not exist.
    """
    import glob

    files: list[Path] = []
    missing: list[str] = []
    names = list(_expand_braces(str(Path(pattern).expanduser())))
    for name in names:
        matches = [name] if Path(name).is_file() else []
        if re.search(r"[*?\[]", name):
            matches = sorted(glob.glob(name))  # noqa: PTH207 (Path.glob does not support absolute patterns)
        files += map(Path, matches)
        if not matches:
            missing.append(name)
    if files and missing:
        raise DataError(
            f"--data '{pattern}': {len(missing)} of the {len(names)} files do not exist; the first is '{missing[0]}'."
        )
    return files


def _expand_braces(pattern: str) -> Iterable[str]:
    group = re.search(r"\{([^{}]*)\}", pattern)
    if group is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", group[1])
    if span is not None:
        first, last = int(span[1]), int(span[2])
        choices = [str(number).zfill(len(span[1])) for number in range(first, last + 1)]
    else:
        choices = group[1].split(",")
    prefix, suffix = pattern[: group.start()], pattern[group.end() :]
    return (prefix + choice + rest for choice in choices for rest in _expand_braces(suffix))


# ------------------------------------------------------------------------------------------------------------ one image

_MAX_SIDE = 512


def read_image(
    path: str | Path, size: int | None = None, *, crop: float = 1.0, value_range: tuple[float, float] | None = None
) -> Tensor:
    """Read an image file of any format, mode and orientation that the commands read.

    Args:
        path: the file.
        size: side that the central square is resized to, in pixels; None keeps the whole image at its size.
        crop: side of the central square, as a fraction of the image's shorter side.
        value_range: the values mapped to black and white in an image with more than 8 bits, as in a network's
            `value_range`; None uses the range of the file's type.

    Returns:
        uint8 (3, H, W) in RGB, or (3, size, size).

    Raises:
        DataError: the file is missing or not an image.
    """
    try:
        image = decode(read_file(Path(path)), name=str(path), value_range=value_range and ValueRange(*value_range))
    except BadImage as error:
        raise DataError(f"'{path}' cannot be read: {error.reason}.") from None
    return image.contiguous() if size is None else center_crop(image, size, share=crop)


def write_example(source: ImageSource, file: Path, attempts: int = 8) -> None:
    """Write the first readable image of a source as a PNG of at most 512 pixels a side.

    Nothing is written if none of the first `attempts` images can be read.
    """
    from torchvision.io import encode_png

    for index in range(min(attempts, len(source))):
        try:
            image = source.read(index)
        except BadImage:
            continue
        height, width = int(image.shape[1]), int(image.shape[2])
        if max(height, width) > _MAX_SIDE:
            image = resize(image, *fitted_size(height, width, min(height, width), _MAX_SIDE))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, bytes(encode_png(image.contiguous()).numpy()))
        return
