"""`pecobook predict`: what a trained classifier, segmenter or detector says of images.

    classifier   predictions.csv                            and pictures/, each image with its class
    segmenter    masks/ (PNG, pixel values are class numbers), classes.txt        and pictures/, classes as colours
    detector     detections.json (COCO's format of results), images.json          and pictures/, boxes, masks, names

Images are read by worker processes; a segmenter and a detector see them one by one, each at its own size, a classifier
several squares at once. One that cannot be read is skipped, counted and listed in skipped.txt. What is found is on the
disk as it comes, a detector's in two .jsonl files that become its .json at the end; after an error or Ctrl-C the files
hold what was done.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pecobook.errors import ConfigError, DataError, WeightsError
from pecobook.settings.predict import PredictConfig
from pecobook.utils.files import write_atomically
from pecobook.utils.output_folder import OutputFolder

if TYPE_CHECKING:
    from torch import Tensor

    from pecobook.data.source import ImageSource


class Writer(Protocol):
    """What is done with the images of one kind of model."""

    def add(self, name: str, file: str, image: Tensor) -> None:
        """Predict one image uint8 (3, H, W) and write what belongs to it alone.

        Args:
            name: of the image, as it is found in its source.
            file: a relative path without extension for what is written of it.
            image: uint8 (3, H, W).
        """

    def finish(self) -> str:
        """Write what belongs to all images; says what was written."""


def predict(config: PredictConfig) -> Path:
    """Write predictions; returns their folder.

    Raises:
        PecobookError: no such run or images, or none that can be read.
    """
    missing = [name for name in ("run", "images", "out") if not getattr(config, name)]
    if missing:
        raise ConfigError(f"--{missing[0]} is missing: pecobook predict RUN IMAGES --out DIR.")
    folder = OutputFolder(config.out)
    folder.check()
    sources = list_images(config.images)
    out = Path(config.out)
    writer = _writer(config, out)
    with folder.begin():
        said = _write(config, sources, writer, out)
    print(f"\nDone: {out}\n{said}", file=sys.stderr)
    return out


def _write(config: PredictConfig, sources: list[tuple[ImageSource, str]], writer: Writer, out: Path) -> str:
    """Predict all images; says what was written. Raises DataError when none can be read."""
    from pecobook.engine.log import Progress

    total = sum(len(source) for source, _ in sources)
    progress = Progress(total=total, start=0, name="predict", quiet=False)
    skipped: list[str] = []
    taken: set[str] = set()
    done, said = 0, ""
    try:
        for name, image in read(sources):
            if isinstance(image, str):
                skipped.append(image)
            else:
                writer.add(name, file_name(name, taken), image)
                done += 1
            progress.show(done + len(skipped), {})
    finally:  # what is done is kept, whatever ended it
        progress.close()
        if done:
            said = _finish(writer, skipped, out, total)
    if not done:
        raise DataError(f"None of the {total} images of '{config.images}' can be read; the first: {skipped[0]}.")
    return said


def _finish(writer: Writer, skipped: list[str], out: Path, total: int) -> str:
    said = writer.finish()
    if skipped:
        write_atomically(out / "skipped.txt", ("\n".join(skipped) + "\n").encode())
        said += f"\n{len(skipped)} of {total} images could not be read; {out / 'skipped.txt'} lists them."
    return said


def list_images(source: str) -> list[tuple[ImageSource, str]]:
    """All images of a file, a folder or another source, whatever their split, and how their names begin.

    Raises:
        DataError: there is no such source.
    """
    from pecobook.data.folders import FileStore, walk
    from pecobook.data.images import open_all_splits
    from pecobook.data.source import IMAGE_EXTENSIONS, ImageSource

    path = Path(source).expanduser()
    if path.is_dir():
        found = walk(path)
        if found.chunks:
            from datasets import concatenate_datasets

            store = FileStore(path, concatenate_datasets(found.chunks))
            return [(ImageSource(store, name=source, split="train"), f"{path}/")]
    elif path.is_file() and path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS:
        from datasets import Dataset

        paths = Dataset.from_dict({"path": [path.name.encode()]})
        return [(ImageSource(FileStore(path.parent, paths), name=source, split="train"), f"{path.parent}/")]
    try:
        every = open_all_splits(source)
    except DataError as error:
        raise DataError(str(error).replace("--data '", "'")) from None
    if not every:
        raise DataError(f"'{source}' holds no image.")
    return [(part, "") for part in every]


def read(sources: list[tuple[ImageSource, str]]) -> Iterator[tuple[str, Tensor | str]]:
    """Names of images and their pixels, or in their place why they cannot be read; decoded by worker processes."""
    from torch.utils.data import DataLoader

    from pecobook.data.stream import default_workers

    for source, beginning in sources:
        workers = default_workers(1) if len(source) > 256 else 0
        loader: DataLoader[Any] = DataLoader(_Whole(source), batch_size=None, num_workers=workers)  # type: ignore[arg-type]
        for index, image in loader:
            yield source.identify(int(index)).removeprefix(beginning), image


class _Whole:
    """Images as they are; a text where one cannot be read."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        from pecobook.data.decode import BadImage

        try:
            return index, self.source.read(index)
        except BadImage as error:
            return index, str(error)


def file_name(name: str, taken: set[str]) -> str:
    """A relative path without extension under which to write what belongs to an image; adds it to `taken`.

    Nothing in it leads out of the folder; two images that differ in their extension alone keep theirs.
    """
    parts = [re.sub(r"[\x00-\x1f\x7f\\]+", "_", part) for part in name.split("/")]
    parts = [part for part in parts if part.strip(".")]
    whole = "/".join(parts) or "image"
    stem = re.sub(r"\.\w{2,4}$", "", whole)
    choice = stem if stem not in taken else whole
    number = 2
    while choice in taken:
        choice, number = f"{whole}-{number}", number + 1
    taken.add(choice)
    return choice


def _writer(config: PredictConfig, out: Path) -> Writer:
    from pecobook.commands.predict import writers
    from pecobook.models.export import read_settings

    kind = read_settings(config.run).get("kind")
    makers: dict[str, Callable[[PredictConfig, Path], Writer]] = {
        "classifier": writers.ClassifierWriter,
        "segmenter": writers.SegmenterWriter,
        "detector": writers.DetectorWriter,
    }
    if kind not in makers:  # a tokenizer, a backbone
        raise WeightsError(
            f"'{config.run}' is a {kind}, which predicts nothing: give a run of finetune, segment or detect."
        )
    return makers[kind](config, out)
