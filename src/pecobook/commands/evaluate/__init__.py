"""`pecobook evaluate`: tokenizers compared by the field's standard metrics.

inputs.py      opens and checks the tokenizers, the images and the networks that judge
measure.py     the sums of one tokenizer and of the originals, batch by batch
statistics.py  the file with the statistics of the originals
tables.py      the table for the terminal and for evaluation.md

The images are read once per image size; only sums are kept, so memory does not grow with the number of images. Unlike
`analyze`, which asks what codewords mean, this command computes the figures that others publish.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pecobook.analysis.report import as_text
from pecobook.commands.evaluate.inputs import Inputs, folder_of, open_inputs
from pecobook.commands.evaluate.measure import Originals, TokenizerSums
from pecobook.commands.evaluate.statistics import write_statistics
from pecobook.commands.evaluate.tables import markdown, table
from pecobook.data.sampler import fixed_permutation
from pecobook.data.source import ImageSource
from pecobook.data.stream import read_crops
from pecobook.engine.log import Progress
from pecobook.errors import DataError
from pecobook.settings.evaluate import EvaluateConfig
from pecobook.settings.values import replace
from pecobook.utils.devices import device
from pecobook.utils.files import write_atomically, write_json
from pecobook.utils.images import to_float
from pecobook.utils.printer import say, show

_FEW = 10_000
"""Number of images below which FID is far above its value for many images."""


def evaluate(config: EvaluateConfig | None = None, **settings: Any) -> Path:
    """Measure the tokenizers and return the folder with evaluation.json and evaluation.md.

    Raises:
        PreflightError: lists all problems that were found before anything was written.
    """
    config = replace(config or EvaluateConfig(), settings)
    inputs = open_inputs(config)
    for metric, reason in inputs.missing.items():
        say(f"not measured: {metric}. {reason}")
    out = Path(config.out)
    with folder_of(config).begin():
        results = _header(config, inputs)
        write_json(out / "evaluation.json", results)  # this file marks the folder as an evaluation
        total = len(set(inputs.sizes)) * inputs.num_images
        rows: dict[int, dict[str, Any]] = {}
        skipped: list[str] = []
        # A GPU's convolutions would otherwise round their inputs to TF32, also in Inception.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with exact, Progress(total=total, start=0, name="evaluate", quiet=False) as progress:
            for number, size in enumerate(dict.fromkeys(inputs.sizes)):
                skipped = _measure(config, inputs, size, rows, progress, number * inputs.num_images)
        results["tokenizers"] = [rows[number] for number in sorted(rows)]
        results["protocol"]["images_read"] = inputs.num_images - len(skipped)
        results["skipped"] = {"count": len(skipped), "names": skipped}
        results["notes"] = _notes(results, inputs)
        write_json(out / "evaluation.json", results)
        write_atomically(out / "evaluation.md", markdown(results).encode())
    show("\n" + as_text(table(results)) + "\n")
    for note in results["notes"]:
        show(note)
    if skipped:
        show(f"{len(skipped)} images could not be read; {out / 'evaluation.json'} lists them.")
    show(f"\nDone: {out / 'evaluation.md'}")
    return out


def _measure(
    config: EvaluateConfig, inputs: Inputs, size: int, rows: dict[int, dict[str, Any]], progress: Progress, before: int
) -> list[str]:
    """Measure all tokenizers that read images of `size` pixels, and return what could not be read."""
    numbers = [number for number, side in enumerate(inputs.sizes) if side == size]
    originals = Originals(inputs)
    sums = {number: TokenizerSums(inputs, number, config.precision) for number in numbers}
    skipped: list[str] = []
    done = 0
    for source, order in _orders(inputs.sources, inputs.num_images):
        for batch in read_crops(source, size, order, batch_size=config.batch_size, workers=config.workers):
            done += len(batch["skipped"])
            skipped += batch["skipped"]
            if "image" in batch:
                pixels = batch["image"].to(device())
                images, judged = to_float(pixels), originals.add(pixels)
                for part in sums.values():
                    part.add(images, judged)
                done += len(pixels)
            progress.show(before + done, {})
    if done == len(skipped):
        raise DataError(f"None of the {done} images of '{config.data}' can be read; the first: {skipped[0]}.")
    reference = inputs.statistics
    if "rfid" in inputs.metrics and reference is None:
        reference = originals.features.gaussian()
        if config.statistics:
            write_statistics(Path(config.statistics), reference, inputs.provenance(size))
    for number, part in sums.items():
        rows[number] = part.result(reference) | originals.result()
    return skipped


def _orders(sources: list[ImageSource], count: int) -> Iterator[tuple[ImageSource, list[int]]]:
    """Yield each source with the numbers of the images to read: all, or `count` of a fixed permutation of all."""
    total = sum(map(len, sources))
    chosen = sorted(fixed_permutation(i, total) for i in range(count)) if count < total else range(total)
    start = 0
    for source in sources:
        yield source, [i - start for i in chosen if start <= i < start + len(source)]
        start += len(source)


def _header(config: EvaluateConfig, inputs: Inputs) -> dict[str, Any]:
    """Return the first entries of evaluation.json: all that a reader needs to repeat the measurement."""
    where = torch.cuda.get_device_name() if device().type == "cuda" else device().type.upper()
    reference = "the same images, cropped alike"
    if inputs.statistics is not None:
        reference = f"the statistics in {Path(config.statistics).name}: {inputs.statistics_words}"
    return {
        "pecobook": version("pecobook"),
        "protocol": {
            "data": config.data,
            "split": inputs.split,
            "fingerprints": [source.fingerprint for source in inputs.sources],
            "images": inputs.num_images,
            "crop": "central square of the shorter side",
            "resize": "bicubic, antialiased, to 8 bits",
            "reconstruction": "one pass of encode and decode, clamped to [0, 1]; rounded to 8 bits for Inception",
            "reference": reference,
            "precision": config.precision,
            "device": where,
        },
        "networks": {name: file._asdict() for name, file in inputs.networks.items()},
        "not_measured": inputs.missing,
        "tokenizers": [],
    }


def _notes(results: dict[str, Any], inputs: Inputs) -> list[str]:
    protocol = results["protocol"]
    count = protocol["images_read"]
    notes = [
        f"{count:,} images ({protocol['split']}) of '{protocol['data']}', {protocol['crop']}, {protocol['resize']}."
    ]
    if inputs.inception is not None:
        name, sha, original = inputs.inception.weights
        of = "the published file" if original else "NOT the published file, so compare with no other rFID"
        notes.append(f"Inception: {name}, SHA-256 {sha[:8]}, {of}. Reference: {protocol['reference']}.")
    if "rfid" in inputs.metrics and count < _FEW:
        notes.append(f"rFID of {count:,} images is above that of the 50,000 which published figures take.")
    if (file := inputs.networks.get("lpips")) is not None and not file.original:
        notes.append(f"LPIPS: {file.file} is not torchvision's file, so compare with no other LPIPS.")
    return notes + [f"Not measured: {metric}. {reason}" for metric, reason in inputs.missing.items()]
