"""`pecobook analyze`: what the codewords of one or more tokenizers mean, in numbers, pictures and one page.

inputs.py      what is analysed, opened and checked
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

from pecobook.errors import ConfigError, Preflight
from pecobook.settings.analyze import AnalyzeConfig
from pecobook.settings.values import replace

if TYPE_CHECKING:
    from pecobook.commands.analyze.inputs import AnalysisInputs
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
    inputs = _preflight(config)
    with _folder(config).begin(_write_first):
        return _write_all(config, inputs, began)


def _write_all(config: AnalyzeConfig, inputs: AnalysisInputs, began: float) -> Path:
    from threadpoolctl import threadpool_limits

    from pecobook.analysis.report import write_report
    from pecobook.commands.analyze.masked import predict
    from pecobook.commands.analyze.measure import analyze_tokenizer
    from pecobook.commands.analyze.names import file_part
    from pecobook.commands.analyze.page import compose
    from pecobook.commands.analyze.pictures import curves_of, side_by_side
    from pecobook.commands.jobs import say
    from pecobook.utils.files import write_atomically

    out = Path(config.out)
    results = _about(config, inputs)
    cost: list[tuple[str, float]] = []
    measured = []
    pictures: dict[str, bytes] = {}
    total = len(inputs.tokenizers) + bool(inputs.runs)
    for number, tokenizer_input in enumerate(inputs.tokenizers, start=1):
        say(f"[{number}/{total}] {tokenizer_input.name}")
        mark = time.monotonic()
        found, skipped, draw = analyze_tokenizer(config, tokenizer_input, inputs)
        results["tokenizers"].append(found.figures)
        results["skipped"] = {"count": len(skipped), "names": skipped}
        _write(results, out, began)  # before pictures, so that none of them can cost the figures
        drawn = draw()
        cost.append((tokenizer_input.name, time.monotonic() - mark))
        files = {kind: f"{kind}-{file_part(number, tokenizer_input.name)}.png" for kind in drawn}
        found.figures["pictures"] = {kind: f"pictures/{file}" for kind, file in files.items()}
        pictures |= {files[kind]: png for kind, png in drawn.items()}
        measured.append(found)
    if inputs.runs:
        say(f"[{total}/{total}] predictions behind masks")
        mark = time.monotonic()
        predictions = predict(inputs.runs, inputs.splits.evaluation, config.seed)
        cost.append(("masked prediction", time.monotonic() - mark))
        results["masked_prediction"] = predictions.figures
        _write(results, out, began)
        pictures |= predictions.draw()
    pictures |= side_by_side(measured)
    pictures |= curves_of(
        "tokenizers", {tokenizer_input.name: tokenizer_input.source for tokenizer_input in inputs.tokenizers}
    )
    pictures |= curves_of("vits", dict(zip(inputs.runs, config.backbone, strict=True)))
    with threadpool_limits(1):
        for name, png in pictures.items():
            write_atomically(out / "pictures" / name, png)
        _write(results, out, began)
        report = write_report(out, compose(results, pictures, cost, dataclasses.asdict(config)))
    say(f"\nDone: open {report}")
    return report


def _about(config: AnalyzeConfig, inputs: AnalysisInputs) -> dict[str, Any]:
    """What is measured, on what, by what; the beginning of `analysis.json`."""
    from importlib.metadata import version

    splits = inputs.splits
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


def _preflight(config: AnalyzeConfig) -> AnalysisInputs:
    from pecobook.commands.analyze.inputs import open_inputs

    found = Preflight()
    found.check(lambda: _check_named(config))
    found.check(_folder(config).check)
    inputs = found.check(lambda: open_inputs(config)) if config.tokenizer else None
    found.finish()
    assert inputs is not None
    return inputs


def _check_named(config: AnalyzeConfig) -> None:
    if not config.tokenizer:
        raise ConfigError("--tokenizer is missing: give a codebook run, dalle:FOLDER or diffusers:FOLDER.")


def _folder(config: AnalyzeConfig) -> OutputFolder:
    from pecobook.utils.output_folder import OutputFolder

    return OutputFolder(
        config.out,
        example="runs/analysis",
        kind="an analysis",
        marker="analysis.json",
        is_own=_is_analysis,
        overwrite=config.overwrite,
    )


def _is_analysis(out: Path) -> bool:
    from pecobook.utils.folder_lock import content

    # One that was killed has pictures alone.
    return (out / "analysis.json").is_file() or {file.name for file in content(out)} <= _FILES


def _write_first(out: Path) -> None:
    (out / "pictures").mkdir(exist_ok=True)
