"""`pecobook predict`: write the predictions of a trained classifier, segmenter or detector for images.

    classifier   predictions.csv                            and pictures/, each image with the best class
                 of clips: the same, for videos or folders of frames, of which pictures/ has the middle frame
    segmenter    masks/ (PNG, pixel values are class numbers), classes.txt        and pictures/, classes as colours
    detector     detections.json (COCO's format of results), images.json          and pictures/, boxes, masks, names
    --attack     robustness.json, the accuracy of a classifier on held-out images, also under attack

Worker processes read the images. A segmenter and a detector process one image at a time, at its own size; a classifier
processes batches of central squares. An image that cannot be read, or on which the network fails, is skipped, counted
and listed in skipped.txt. A picture with a side of more than 65,500 pixels, which JPEG cannot hold, is scaled down.
Predictions are written to disk immediately; those of a detector go into two .jsonl files, which become the .json files
at the end. After an error or Ctrl-C the files contain the predictions made so far.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from pecobook.commands.predict import robustness, writers
from pecobook.commands.predict.sources import Sources
from pecobook.commands.predict.writers import Writer
from pecobook.data.decode import BadImage
from pecobook.data.stream import read_whole
from pecobook.engine.log import Progress
from pecobook.engine.value_range import set_value_range
from pecobook.errors import ConfigError, DataError, WeightsError, counted
from pecobook.models.export import read_settings
from pecobook.settings.predict import PredictConfig
from pecobook.utils.files import write_atomically
from pecobook.utils.output_folder import OutputFolder
from pecobook.utils.printer import show

_MAX_NAME = 230
"""Maximum number of bytes in a name in the output folder; most file systems allow 255."""


def predict(config: PredictConfig) -> Path:
    """Write predictions and return their folder.

    Raises:
        PecobookError: the run or the images do not exist, or no image can be read.
    """
    missing = [f"--{name}" for name in ("run", "images", "out") if not getattr(config, name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigError(f"{', '.join(missing)} {verb} missing: pecobook predict RUN IMAGES --out DIR.")
    folder = OutputFolder(config.out, data=config.images)
    folder.check()
    if config.attack.names:
        classifier, splits = robustness.open_labelled(config)
        with folder.begin():
            summary = robustness.measure(config, classifier, splits, folder.path)
        show(f"\nDone: {folder.path / robustness.FILE}\n{summary}")
        return folder.path
    writer = _writer(config, folder.path)
    sources = writer.sources(config.images)
    set_value_range([source for source, _ in sources], config.value_range, [config.run])
    with folder.begin():
        summary = _predict_all(config, sources, writer, folder.path)
    show(f"\nDone: {folder.path}\n{summary}")
    return folder.path


def _predict_all(config: PredictConfig, sources: Sources, writer: Writer, out: Path) -> str:
    """Predict all images; return a text on what was written. Raises DataError if no image can be read."""
    total, unit = sum(len(source) for source, _ in sources), sources[0][0].unit
    progress = Progress(total=total, start=0, name="predict", quiet=False)
    skipped: list[str] = []
    used_names: set[str] = set()
    num_predicted, summary = 0, ""
    try:
        for source, prefix in sources:
            for index, image in enumerate(read_whole(source, writer.shortest)):
                try:
                    if isinstance(image, BadImage):
                        raise image
                    name = source.identify(index).removeprefix(prefix)
                    writer.add(name, file_name(name, used_names), image)
                    num_predicted += 1
                except BadImage as error:
                    skipped.append(str(error))
                progress.show(num_predicted + len(skipped), {})
    finally:  # also after an error or Ctrl-C, the predictions that were made are kept
        progress.close()
        if num_predicted:
            summary = writer.finish()
            if skipped:
                write_atomically(out / "skipped.txt", ("\n".join(skipped) + "\n").encode())
                summary += f"\n{len(skipped)} of {counted(total, unit)} were skipped; {out / 'skipped.txt'} says why."
    if not num_predicted:
        raise DataError(
            f"None of the {counted(total, unit)} of '{config.images}' can be predicted; the first: {skipped[0]}."
        )
    return summary


def file_name(name: str, used_names: set[str]) -> str:
    """Return a relative path without extension for an image's files, and add it to `used_names`.

    The path stays inside the output folder. Of images whose names differ only in the extension, the first loses the
    extension and the others keep it. A folder such as "a.png" becomes "a_png", since a file may have that name. Very
    long names are cut.
    """
    parts = [re.sub(r"[\x00-\x1f\x7f\\]+", "_", part) for part in name.split("/")]
    *folders, last = [_shortened(part) for part in parts if part.strip(".")] or ["image"]
    with_extension = "/".join([*(re.sub(r"\.(png|jpg)$", r"_\1", folder) for folder in folders), last])
    stem = re.sub(r"\.\w{2,4}$", "", with_extension)
    path = stem if stem not in used_names else with_extension
    number = 2
    while path in used_names:
        path, number = f"{with_extension}-{number}", number + 1
    used_names.add(path)
    return path


def _shortened(part: str) -> str:
    """Return a part of a path, cut so that an extension and a number still fit; a hash keeps cut parts distinct."""
    data = part.encode(errors="surrogateescape")
    if len(data) <= _MAX_NAME:
        return part
    return data[: _MAX_NAME - 17].decode(errors="ignore") + "-" + hashlib.sha256(data).hexdigest()[:16]


def _writer(config: PredictConfig, out: Path) -> Writer:
    writer_types: dict[str, type[Writer]] = {
        "classifier": writers.ClassifierWriter,
        "clip classifier": writers.ClipWriter,
        "segmenter": writers.SegmenterWriter,
        "detector": writers.DetectorWriter,
    }
    kind = read_settings(config.run, kinds=writer_types).get("kind")
    if kind not in writer_types:  # a tokenizer, a backbone
        raise WeightsError(
            f"'{config.run}' is a {kind}, which predicts nothing: give a run of finetune, segment or detect, or write "
            "the features of the images with pecobook embed."
        )
    return writer_types[kind](config, out)
