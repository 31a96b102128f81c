"""Image sources: what `--data SOURCE` names, opened as a training and an evaluation split.

    folder of images    folders.py     any depth; class subfolders give labels; train/ and test/ give splits
    parquet             tables.py      a file or a folder; column `image`, optional `label`
    hf:owner/name       tables.py      a data set of the Hugging Face hub
    tar shards          shards.py      WebDataset
    photos              photos.py      photographs that are installed with scikit-image and scikit-learn

Each form gives parts, see source.py, and `assemble` makes the same `Splits` of all of them. Nothing is decoded before
it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from pecobook.data.source import ImageSource, Part, Splits, assemble
from pecobook.errors import DataError, did_you_mean

SOURCE_FORMS = (
    "A source is a folder of images, a parquet file or folder, tar shards ('shards/', 'x-{000..009}.tar'), "
    "'hf:owner/name', or 'photos' (built in)."
)


def open_images(source: str) -> Splits:
    """Open what `--data` names; see the top of this file for the forms.

    The evaluation split is the source's own `test` split if it has one, else its `validation` split, else 10%
    of the training images, chosen by a fixed permutation whatever the seed. Where both exist, `validation`
    stays unused, unless `train` and `validation` have labels and `test` has none (as ImageNet's). Split names
    count in any case.

    Raises:
        DataError: there is no such source, or nothing in it can be used; says what to do.
    """
    if source == "photos":
        from pecobook.data.photos import open_photos

        return open_photos()
    return assemble(source, _parts(source))


def open_readable(source: str) -> Splits:
    """Open what `--data` names. Raises DataError also when none of the first few training images can be read."""
    splits = open_images(source)
    check_readable(splits.train)
    return splits


def check_readable(source: ImageSource, count: int = 8) -> None:
    """Raise DataError when none of the first few images can be read."""
    from pecobook.data.decode import BadImage

    reasons = []
    for index in range(min(count, len(source))):
        try:
            source.read(index)
        except BadImage as error:
            reasons.append(str(error))
        else:
            return
    raise DataError(f"None of the first {len(reasons)} images of '{source.name}' can be read; the first: {reasons[0]}.")


def check_labels(splits: Splits, source: str) -> None:
    """Raise DataError unless training and evaluation images have labels; `source` is the value of `--data`."""
    if splits.train.labels is None:
        raise DataError(f"--data '{source}' has no labels: put the images of each class in their own subfolder.")
    if splits.evaluation.labels is None:
        raise DataError(f"--data '{source}' has no labels for its {splits.evaluation_name} images.")


def open_every(source: str) -> list[ImageSource]:
    """All images of what `--data` names, a source for each of its splits. Raises DataError as `open_images`."""
    if source == "photos":
        splits = open_images(source)
        return [splits.train, splits.evaluation]
    found = _parts(source).items()
    return [ImageSource(part.store, name=source, split=name, rows=part.rows) for name, part in found if len(part.rows)]


def _parts(source: str) -> Mapping[str, Part]:
    if source.startswith("hf:"):
        from pecobook.data.tables import hub_parts

        return hub_parts(source)
    try:
        path = Path(source).expanduser()
        if source and path.is_dir():
            from pecobook.data.folders import folder_parts

            return folder_parts(source, path)
        files = [path] if source and path.is_file() else expand_pattern(source)
    except (OSError, RuntimeError) as error:  # a name that is too long; "~nobody"
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"--data '{source}' cannot be opened: {reason}.") from error
    return _file_parts(source, files)


def _file_parts(source: str, files: list[Path]) -> Mapping[str, Part]:
    extensions = {file.suffix.lower() for file in files}
    if extensions == {".parquet"}:
        from pecobook.data.tables import parquet_parts

        return parquet_parts(source, files)
    if extensions == {".tar"}:
        from pecobook.data.shards import shard_parts

        return shard_parts(source, files)
    if files:
        kind = f"'{files[0].suffix}' files are no source by themselves; give the folder that holds them."
        raise DataError(f"--data '{source}': {kind}\n{SOURCE_FORMS}")
    raise DataError(f"--data '{source}': {_what_is_missing(source)}\n{SOURCE_FORMS}")


def _what_is_missing(source: str) -> str:
    """Name the first part of a path that does not exist, and its nearest neighbour."""
    if re.search(r"[*?{\[]", source):
        return "no file matches this pattern."
    missing = Path(source).expanduser()
    while not missing.parent.exists() and missing.parent != missing:
        missing = missing.parent
    try:
        siblings = {path.name: str(path) for path in missing.parent.iterdir()}
    except OSError:
        siblings = {}
    if missing.parent == Path():
        siblings |= {"photos": "photos"}
    near = did_you_mean(missing.name, siblings)
    for name, full in siblings.items():
        near = near.replace(f"'{name}'", f"'{full}'")
    return f"'{missing}' does not exist.{near}"


def expand_pattern(pattern: str) -> list[Path]:
    """Files named by a pattern with `{000..009}`, `{a,b}`, `*`, `?` or `[...]`, in order.

    Raises:
        DataError: some of the files that braces name do not exist.
    """
    import glob

    files: list[Path] = []
    missing: list[str] = []
    names = list(_expand_braces(str(Path(pattern).expanduser())))
    for name in names:
        found = [name] if Path(name).is_file() else []
        if re.search(r"[*?\[]", name):
            found = sorted(glob.glob(name))  # noqa: PTH207 (Path.glob knows no absolute patterns)
        files += map(Path, found)
        if not found:
            missing.append(name)
    if files and missing:
        raise DataError(
            f"--data '{pattern}': {len(missing)} of the {len(names)} files do not exist, the first is '{missing[0]}'."
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
    head, tail = pattern[: group.start()], pattern[group.end() :]
    return (head + choice + rest for choice in choices for rest in _expand_braces(tail))
