"""`pecobook check`: looks at every image of a source, and says what a command would learn from and what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

from pecobook.commands.check.sheet import contact_sheet
from pecobook.commands.check.survey import Survey, survey
from pecobook.commands.table import COMMANDS
from pecobook.data.decode import open_image
from pecobook.data.dense.coco_files import find_annotations, looks_like_coco
from pecobook.data.dense.segmentation_pairs import find_pairs
from pecobook.data.images import check_labels
from pecobook.data.source import Splits
from pecobook.data.summary import aligned
from pecobook.engine.stage import Stage
from pecobook.engine.value_range import set_value_range
from pecobook.errors import DataError, PecobookError
from pecobook.recipes import recipe
from pecobook.settings.check import CheckConfig
from pecobook.settings.training import TrainConfig
from pecobook.settings.values import replace
from pecobook.stages.classify import ClassifyStage
from pecobook.stages.detect import DetectStage
from pecobook.stages.segment import SegmentStage
from pecobook.utils.files import write_atomically
from pecobook.utils.output_folder import check_new_file
from pecobook.utils.printer import show


def check(config: CheckConfig | None = None, **settings: Any) -> dict[str, Any]:
    """Look at every image, print what was found, and return it; `problems` lists what is wrong.

    Raises:
        PecobookError: a flag is wrong, or the contact sheet exists already.
    """
    config = replace(config or CheckConfig(), settings)
    check_new_file(config.out)
    if config.recipe:
        recipe(config.task, config.recipe)  # raises ConfigError for a name that does not exist
    task = layout_of(config.data) if config.task == "auto" else config.task
    splits, problems = _open(task, config)
    found: Survey | None = None
    if splits is not None:
        found = survey(splits, labels=task not in ("contrast", "codebook", "pretrain"), workers=config.workers)
        problems += found.problems
    report = _report(config, task, found, problems)
    if config.out and splits is not None:
        write_atomically(Path(config.out), contact_sheet(splits, config.samples))
        report["contact_sheet"] = config.out
    show(json.dumps(report, indent=2) if config.json else _text(config, report), stdout=True)
    return report


def _open(task: str, config: CheckConfig) -> tuple[Splits | None, list[str]]:
    """Open the source as the command would; return the splits, or None where they cannot be opened, and the problems.

    Where the command refuses the source, the splits are those of a lenient attempt, so that the survey can say more.
    """
    lenient: dict[str, list[dict[str, Any]]] = {
        "segment": [{"verify": False}, {"skip_bad": True}],
        "detect": [{"skip_bad": True}],
    }
    problems: list[str] = []
    for changes in [{}, *lenient.get(task, [])]:
        try:
            splits = _open_as(task, _command_settings(task, config, changes))
        except PecobookError as error:
            problems = problems or [str(error)]
            continue
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                set_value_range(splits, config.value_range)
        except PecobookError as error:
            problems.append(str(error))
        problems += [line for line in said.getvalue().splitlines() if line.startswith("Warning: ")]
        return splits, problems
    return None, problems


def _command_settings(task: str, config: CheckConfig, changes: dict[str, Any]) -> TrainConfig:
    """Return the settings of a command: those of the recipe, the flags that differ from their defaults, `changes`."""
    command = "finetune" if task == "images" else task
    settings: TrainConfig = recipe(command, config.recipe) if config.recipe else COMMANDS[command].settings()
    names = {field.name for field in dataclasses.fields(settings)} - {"data", "out", "workers"}
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name in names and getattr(config, field.name) != field.default
    }
    return replace(settings, {"data": config.data, **given, **changes})


def _open_as(task: str, settings: TrainConfig) -> Splits:
    """Open the images of a command. Raises PecobookError."""
    by_task: dict[str, type[Stage[Any]]] = {"segment": SegmentStage, "detect": DetectStage, "finetune": ClassifyStage}
    stage = by_task.get(task, ClassifyStage)
    splits = stage.open(settings)
    if task == "finetune":
        check_labels(splits, settings.data)
    return splits


def _report(config: CheckConfig, task: str, found: Survey | None, problems: list[str]) -> dict[str, Any]:
    return {
        "data": config.data,
        "task": task,
        "ok": not problems,
        "problems": problems,
        **({"summary": _summary(found.lines), **found.figures} if found is not None else {}),
    }


def _summary(lines: list[tuple[str, str]]) -> dict[str, str]:
    """Return the text of each topic; a topic that comes several times, as notes do, has one line for each."""
    summary: dict[str, str] = {}
    for topic, text in lines:
        summary[topic] = f"{summary[topic]}\n{text}" if topic in summary else text
    return summary


def _text(config: CheckConfig, report: dict[str, Any]) -> str:
    task = report["task"]
    how = "images, with labels where there are any" if task == "images" else f"'pecobook {task}' reads it"
    guessed = " (guessed from the files; name the command to choose)" if config.task == "auto" else ""
    summary = report.get("summary", {}).items()
    lines = aligned(
        [("read as", how + guessed), *((topic, line) for topic, text in summary for line in text.split("\n"))]
    )
    lines += [f"contact sheet: {report['contact_sheet']}"] if "contact_sheet" in report else []
    if report["problems"]:
        number = len(report["problems"])
        lines += ["", f"{number} thing{'s are' if number > 1 else ' is'} wrong:"]
        lines += [f"- {problem}".replace("\n", "\n  ") for problem in report["problems"]]
    else:
        lines += ["", "Nothing is wrong with these images."]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- what kind of data it is


def layout_of(data: str) -> str:
    """Return "detect" or "segment" for a folder in one of their layouts, and otherwise "images"."""
    root = Path(data).expanduser()
    if not data or not root.is_dir():
        return "images"
    try:
        if any(looks_like_coco(file) for files in find_annotations(root).values() for file, _ in files):
            return "detect"
        found = find_pairs(data, root)
    except (DataError, OSError):
        return "images"
    is_usual = len(found.pairs) > len(found.unpaired) and not _is_photograph(root / found.pairs[0][1])
    return "segment" if is_usual else "images"


def _is_photograph(mask: Path) -> bool:
    """Return whether a file is a JPEG in colour, so that "mask" is the name of a class of photographs."""
    try:
        with open_image(mask) as picture:
            return picture.format == "JPEG" and picture.mode == "RGB"
    except Exception:  # a header of arbitrary bytes may raise any exception
        return False
