"""`pecobook analyze`: what the codewords of one or more tokenizers mean, in numbers, pictures and one page.

inputs.py      opens and checks all inputs
measure.py     measures a tokenizer, on the same images as all other tokenizers
pictures.py    draws the pictures of tokenizers
bank.py        codebook usage and patch galleries of a whole token bank
classifier.py  the classifier for originals and reconstructions
masked.py      predictions of pre-trained ViTs for masked patches
page.py        the report, which `pecobook demo` writes too
tables.py      sections of the report with one column per tokenizer
comparing.py   sections of the report on paired comparisons and on pre-trained ViTs, with sampling errors
"""

from __future__ import annotations

import dataclasses
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pecobook.analysis.atlas import Atlas
from pecobook.analysis.report import write_pictures, write_report
from pecobook.analysis.wording import file_part
from pecobook.commands.analyze.inputs import AnalysisInputs, open_inputs
from pecobook.commands.analyze.masked import predict
from pecobook.commands.analyze.measure import analyze_tokenizer
from pecobook.commands.analyze.page import compose
from pecobook.commands.analyze.pictures import curves_of, side_by_side
from pecobook.engine.preamble import show_source
from pecobook.errors import ConfigError, Preflight
from pecobook.settings.analyze import AnalyzeConfig
from pecobook.settings.values import replace
from pecobook.utils.extras import require
from pecobook.utils.files import write_json
from pecobook.utils.output_folder import OutputFolder
from pecobook.utils.printer import show


def analyze(config: AnalyzeConfig | None = None, **settings: Any) -> Path:
    """Measure all tokenizers, write the report, and return the path of the report.

    Raises:
        PreflightError: lists all problems that were found before anything was written.
    """
    config = replace(config or AnalyzeConfig(), settings)
    require("analysis", "pecobook analyze")
    began = time.monotonic()
    inputs = check_and_open(config)
    show_source(inputs.splits)
    with _folder(config).begin():
        return _write_all(config, inputs, began)


def _write_all(config: AnalyzeConfig, inputs: AnalysisInputs, began: float) -> Path:
    out = Path(config.out)
    results = _header(config, inputs)
    _write(results, out, began)  # this file marks the folder as an analysis
    cost: list[tuple[str, float]] = []
    measured = []
    pictures: dict[str, bytes] = {}
    atlases: dict[str, Atlas] = {}
    total = len(inputs.tokenizers) + bool(inputs.runs)
    for number, tokenizer_input in enumerate(inputs.tokenizers, start=1):
        show(f"[{number}/{total}] {tokenizer_input.name}")
        step_began = time.monotonic()
        metrics, skipped, draw = analyze_tokenizer(config, tokenizer_input, inputs)
        results["tokenizers"].append(metrics.values)
        results["skipped"] = {"count": len(skipped), "names": skipped}
        _write(results, out, began)  # before drawing, so that the numbers survive an error in a picture
        show("  pictures")
        drawn, atlases[tokenizer_input.name] = draw()
        del draw  # and with it the images
        cost.append((tokenizer_input.name, time.monotonic() - step_began))
        files = {kind: f"{kind}-{file_part(number, tokenizer_input.name)}.png" for kind in drawn}
        metrics.values["pictures"] = {kind: f"pictures/{file}" for kind, file in files.items()}
        pictures |= {files[kind]: png for kind, png in drawn.items()}
        measured.append(metrics)
    if inputs.runs:
        show(f"[{total}/{total}] masked prediction")
        step_began = time.monotonic()
        predictions = predict(inputs.runs, inputs.splits.evaluation, config.seed)
        cost.append(("masked prediction", time.monotonic() - step_began))
        results["masked_prediction"] = predictions.records
        _write(results, out, began)
        pictures |= predictions.draw()
    pictures |= side_by_side(measured)
    pictures |= curves_of("tokenizers", {tokenizer.name: tokenizer.source for tokenizer in inputs.tokenizers})
    pictures |= curves_of("vits", dict(zip(inputs.runs, config.backbone, strict=True)))
    from threadpoolctl import threadpool_limits  # scikit-learn installs it

    with threadpool_limits(1):
        write_pictures(out, pictures)
        _write(results, out, began)
        report = write_report(out, compose(results, pictures, cost, dataclasses.asdict(config), atlases=atlases))
    show(f"\nDone: open {report}")
    return report


def _header(config: AnalyzeConfig, inputs: AnalysisInputs) -> dict[str, Any]:
    """Return the first entries of `analysis.json`: version, seed and data."""
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
    results["seconds"] = round(time.monotonic() - began, 1)
    write_json(out / "analysis.json", results)


def check_and_open(config: AnalyzeConfig) -> AnalysisInputs:
    """Check the output folder, and open all inputs. Raises PreflightError with all problems."""
    preflight = Preflight()
    if not config.tokenizer:
        error = ConfigError("--tokenizer is missing: give a codebook run, dalle:FOLDER or diffusers:FOLDER.")
        preflight.problems.append(error)
    preflight.check(_folder(config).check)
    inputs = preflight.check(lambda: open_inputs(config)) if config.tokenizer else None
    preflight.finish()
    assert inputs is not None
    return inputs


def _folder(config: AnalyzeConfig) -> OutputFolder:
    return OutputFolder(
        config.out,
        example="runs/analysis",
        kind="an analysis",
        marker="analysis.json",
        files=("analysis.json", "report.html", "pictures/*.png"),
        data=config.data,
        overwrite=config.overwrite,
    )
