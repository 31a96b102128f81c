"""`pecobook analyze`: what the codewords of one or more tokenizers mean, in numbers, pictures and one page.

subjects.py    what is analysed, opened and checked
measure.py     figures of a tokenizer, on the same images as all others
pictures.py    its pictures
bank.py        usage and galleries of a whole token bank
classifier.py  who classifies reconstructions
masked.py      what pre-trained ViTs predict behind a mask
page.py        the report, also of `pecobook demo`
comparing.py   its sections on paired comparisons and on pre-trained ViTs, with the errors of both
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pecobook.errors import ConfigError, PecobookError, PreflightError
from pecobook.settings.analyze import AnalyzeConfig
from pecobook.settings.values import replace

if TYPE_CHECKING:
    from pecobook.commands.analyze.subjects import Subjects
    from pecobook.utils.output_folder import OutputFolder

__all__ = ["AnalyzeConfig", "analyze"]


_FILES = {"analysis.json", "report.html", "pictures"}


def analyze(config: AnalyzeConfig | None = None, **settings: Any) -> Path:
    """Measure everything and write the report; returns its path.

    Raises:
        PreflightError: problems found before anything was written, all of them.
    """
    config = replace(config or AnalyzeConfig(), settings)
    began = time.monotonic()
    subjects = _preflight(config)
    with _folder(config).begin(_write_first):
        return _write_all(config, subjects, began)


def _write_all(config: AnalyzeConfig, subjects: Subjects, began: float) -> Path:
    from threadpoolctl import threadpool_limits

    from pecobook.analysis.report import write_report
    from pecobook.commands.analyze.masked import predict
    from pecobook.commands.analyze.measure import look
    from pecobook.commands.analyze.names import file_part
    from pecobook.commands.analyze.page import compose
    from pecobook.commands.analyze.pictures import curves_of, side_by_side
    from pecobook.commands.jobs import say
    from pecobook.utils.files import write_atomically

    out = Path(config.out)
    results = _about(config, subjects)
    cost: list[tuple[str, float]] = []
    looks = []
    pictures: dict[str, bytes] = {}
    total = len(subjects.tokenizers) + bool(subjects.runs)
    for number, subject in enumerate(subjects.tokenizers, start=1):
        say(f"[{number}/{total}] {subject.name}")
        mark = time.monotonic()
        found, skipped, draw = look(config, subject, subjects)
        results["tokenizers"].append(found.figures)
        results["skipped"] = {"count": len(skipped), "names": skipped}
        _write(results, out, began)  # before pictures, so that none of them can cost the figures
        drawn = draw()
        cost.append((subject.name, time.monotonic() - mark))
        files = {kind: f"{kind}-{file_part(number, subject.name)}.png" for kind in drawn}
        found.figures["pictures"] = {kind: f"pictures/{file}" for kind, file in files.items()}
        pictures |= {files[kind]: png for kind, png in drawn.items()}
        looks.append(found)
    if subjects.runs:
        say(f"[{total}/{total}] predictions behind masks")
        mark = time.monotonic()
        predictions = predict(subjects.runs, subjects.splits.evaluation, config.seed)
        cost.append(("masked prediction", time.monotonic() - mark))
        results["masked_prediction"] = predictions.figures
        _write(results, out, began)
        pictures |= predictions.draw()
    pictures |= side_by_side(looks)
    pictures |= curves_of("tokenizers", {subject.name: subject.source for subject in subjects.tokenizers})
    pictures |= curves_of("vits", dict(zip(subjects.runs, config.backbone, strict=True)))
    with threadpool_limits(1):
        for name, png in pictures.items():
            write_atomically(out / "pictures" / name, png)
        _write(results, out, began)
        report = write_report(out, compose(results, pictures, cost, dataclasses.asdict(config)))
    say(f"\nDone: open {report}")
    return report


def _about(config: AnalyzeConfig, subjects: Subjects) -> dict[str, Any]:
    """What is measured, on what, by what; the beginning of `analysis.json`."""
    from importlib.metadata import version

    splits = subjects.splits
    return {
        "pecobook": version("pecobook"),
        "seed": config.seed,
        "data": config.data,
        "fingerprints": {"train": splits.train.fingerprint, "evaluation": splits.evaluation.fingerprint},
        "evaluation": splits.evaluation_name,
        "num_classes": len(splits.train.classes or ()),
        "tokenizers": [],
    }


def _write(results: dict[str, Any], out: Path, began: float) -> None:
    from pecobook.utils.files import write_atomically

    results["seconds"] = round(time.monotonic() - began, 1)
    write_atomically(out / "analysis.json", (json.dumps(results, indent=2) + "\n").encode())


def _preflight(config: AnalyzeConfig) -> Subjects:
    from pecobook.commands.analyze.subjects import open_subjects

    problems: list[PecobookError] = []
    found = None
    try:
        if not config.tokenizer:
            raise ConfigError("--tokenizer is missing: give a codebook run, dalle:FOLDER or diffusers:FOLDER.")
        _folder(config).check()
    except PecobookError as error:
        problems.append(error)
    if config.tokenizer:
        try:
            found = open_subjects(config)
        except PreflightError as error:
            problems += error.problems
        except PecobookError as error:
            problems.append(error)
    if problems or found is None:
        raise PreflightError(problems)
    return found


def _folder(config: AnalyzeConfig) -> OutputFolder:
    from pecobook.utils.output_folder import OutputFolder

    return OutputFolder(
        config.out,
        example="runs/analysis",
        kind="an analysis",
        mark="analysis.json",
        is_own=_is_analysis,
        overwrite=config.overwrite,
    )


def _is_analysis(out: Path) -> bool:
    from pecobook.utils.folder_lock import content

    # One that was killed has pictures alone.
    return (out / "analysis.json").is_file() or {file.name for file in content(out)} <= _FILES


def _write_first(out: Path) -> None:
    (out / "pictures").mkdir(exist_ok=True)
