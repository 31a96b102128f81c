"""`pecobook check`: reads every image of a source, and reports what a command would learn from and what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pecobook.commands.check.sheet import contact_sheet
from pecobook.commands.check.survey import Survey, survey
from pecobook.commands.table import COMMANDS
from pecobook.data.decode import open_image
from pecobook.data.dense.coco_files import find_annotations, looks_like_coco, other_format, stray_annotations
from pecobook.data.dense.segmentation_pairs import find_pairs
from pecobook.data.images import check_labels
from pecobook.data.names import BESIDE_ITS_IMAGE, IN_FOLDER_OF_MASKS
from pecobook.data.source import Splits
from pecobook.data.summary import aligned, left_out_of
from pecobook.engine.stage import Stage
from pecobook.engine.value_range import set_value_range
from pecobook.errors import DataError, PecobookError
from pecobook.recipes import recipe
from pecobook.settings.check import CheckConfig
from pecobook.settings.training import TrainConfig
from pecobook.settings.values import replace, to_dict
from pecobook.stages.classify import ClassifyStage
from pecobook.stages.detect import DetectStage
from pecobook.stages.segment import SegmentStage
from pecobook.utils.files import write_atomically
from pecobook.utils.output_folder import check_new_file
from pecobook.utils.printer import show

_STAGES: dict[str, type[Stage[Any]]] = {"finetune": ClassifyStage, "segment": SegmentStage, "detect": DetectStage}
"""The stages that open a source in their own way."""
_READS_AS = {"images": "finetune", "probe": "finetune", "embed": "pretrain", "tokenize": "pretrain"}
"""Commands mapped to a training command that reads images in the same way."""
_TEXT_FILES = ("extension .json", "extension .xml", "extension .txt")
_LENIENT: dict[str, tuple[dict[str, bool], ...]] = {
    "segment": ({"verify": False}, {"skip_bad": True}),
    "detect": ({"skip_bad": True},),
}
"""Settings with which a command may open a source that it would otherwise refuse."""


def check(config: CheckConfig | None = None, **settings: Any) -> dict[str, Any]:
    """Read every image, print what was found, and return it; `problems` lists what is wrong.

    Raises:
        PecobookError: a flag is wrong, or the contact sheet exists already.
    """
    config = replace(config or CheckConfig(), settings)
    check_new_file(config.out)
    if config.recipe:
        recipe(_READS_AS.get(config.task, config.task), config.recipe)  # raises ConfigError if there is no such recipe
    task = config.task if config.task != "auto" else "finetune" if config.clip.frames else layout_of(config.data)
    splits, problems = _open(task, config)
    found: Survey | None = None
    if splits is not None:
        found = survey(splits, labels=task in (*_STAGES, "probe", "images"), workers=config.workers)
        problems += found.problems
        if config.task == "auto" and task == "images":
            found.lines.extend(("note", note) for note in _unread_annotations(config.data, left_out_of(splits)))
    report = _report(config, task, found, problems)
    if config.out and splits is not None:
        write_atomically(Path(config.out), contact_sheet(splits, config.samples))
        report["contact_sheet"] = config.out
    show(json.dumps(report, indent=2) if config.json else _text(config, report), stdout=True)
    return report


def _open(task: str, config: CheckConfig) -> tuple[Splits | None, list[str]]:
    """Open the source as the command would; return the splits (None if they cannot be opened) and the problems.

    If the command refuses the source, the splits are those of a lenient attempt, so that the survey can say more.
    """
    problems: list[str] = []
    for changes in ({}, *_LENIENT.get(task, ())):
        try:
            settings = _command_settings(task, config, changes)
            splits = _STAGES.get(_READS_AS.get(task, task), Stage).open(settings)
            if task in ("finetune", "probe"):
                check_labels(splits, settings.data)
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
    """Return the settings of a command: the recipe's, the flags that differ from their defaults, and `changes`."""
    command = _READS_AS.get(task, task)
    settings: TrainConfig = recipe(command, config.recipe) if config.recipe else COMMANDS[command].settings()
    names = {field.name for field in dataclasses.fields(settings)} - {"data", "out", "workers"}
    defaults = to_dict(type(config)())
    given = {name: value for name, value in to_dict(config).items() if name in names and value != defaults[name]}
    return replace(settings, {"data": config.data, **given, **changes})


def _report(config: CheckConfig, task: str, found: Survey | None, problems: list[str]) -> dict[str, Any]:
    return {
        "data": config.data,
        "task": task,
        "ok": not problems,
        "problems": problems,
        **({"summary": _summary(found.lines), **found.figures} if found is not None else {}),
    }


def _summary(lines: list[tuple[str, str]]) -> dict[str, str]:
    """Return the text of each topic; a topic that occurs several times, as notes do, has one line each time."""
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
        lines += ["", f"Nothing is wrong with these {'clips' if 'clips' in report.get('summary', {}) else 'images'}."]
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


def _unread_annotations(data: str, left_out: Mapping[str, int]) -> Iterator[str]:
    """Yield a note on masks and one on objects that lie next to images in no layout that is read."""
    root = Path(data).expanduser()
    if not data or not root.is_dir():
        return
    if masks := sum(left_out.get(reason, 0) for reason in (IN_FOLDER_OF_MASKS, BESIDE_ITS_IMAGE)):
        why = f"pecobook check segment --data {shlex.quote(data)}"
        yield f"{masks:,} files look like masks, and are not read: '{why}' says why."
    kind = stray_annotations(root) or other_format(root)
    is_of_each_image = sum(count for reason, count in left_out.items() if reason in _TEXT_FILES) > 2
    if kind and (is_of_each_image or isinstance(kind, Path) or kind.startswith(("CVAT", "FiftyOne"))):
        why = f"pecobook check detect --data {shlex.quote(data)}"
        yield f"Annotations of objects lie beside the images, and are not read ({kind}): '{why}' says more."


def _is_photograph(mask: Path) -> bool:
    """Return whether a file is a JPEG in colour, so that "mask" is the name of a class of photographs."""
    try:
        with open_image(mask) as picture:
            return picture.format == "JPEG" and picture.mode == "RGB"
    except Exception:  # a header of arbitrary bytes may raise any exception
        return False
