"""`pecobook compare`: training runs side by side: curves, last evaluations, the settings in which they differ.

report.html            the picture and the tables on one page
pictures/curves.png    the picture alone
compare.json           the numbers and the settings
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pecobook.analysis.charts import training_curves, varying_metrics
from pecobook.analysis.report import Picture, Report, Section, Table, as_text, write_pictures, write_report
from pecobook.errors import ConfigError, Preflight
from pecobook.settings.compare import CompareConfig
from pecobook.settings.values import flag, replace
from pecobook.utils.files import write_json
from pecobook.utils.json_files import OBJECT, evaluation_of, is_number, last_evaluated, list_of, read_json, read_metrics
from pecobook.utils.output_folder import OutputFolder
from pecobook.utils.printer import show

_MARKER = "compare.json"
_MAX_CURVES = 8


class Run(NamedTuple):
    """The content of a run folder."""

    name: str
    settings: dict[str, Any]
    """Value of each setting, by the name of its flag without dashes, such as `optim.lr`."""
    metrics: list[dict[str, Any]]

    @property
    def last_evaluation(self) -> dict[str, Any]:
        """The step and the numbers of the last evaluation, or of the last logged step if there was none."""
        record = last_evaluated(self.metrics) or self.metrics[-1]
        numbers = evaluation_of(record) or record
        return {"step": record["step"], **{name: value for name, value in numbers.items() if is_number(value)}}


def compare(config: CompareConfig | None = None, **settings: Any) -> Path:
    """Write the comparison and return its folder.

    Raises:
        PecobookError: a folder is not a run or has logged nothing, or the output folder cannot be used.
    """
    config = replace(config or CompareConfig(), settings)
    preflight = Preflight()
    folder = OutputFolder(
        config.out,
        example="runs/comparison",
        kind="a comparison",
        marker=_MARKER,
        schema={"runs": list_of(OBJECT)},
        files=(_MARKER, "report.html", "pictures/curves.png"),
        overwrite=config.overwrite,
    )
    preflight.check(folder.check)
    if not config.runs:
        preflight.problems.append(ConfigError("Runs are missing: pecobook compare RUN [RUN ...] --out DIR."))
    runs = [preflight.check(partial(read_run, text)) for text in config.runs]
    preflight.finish()
    named = _named([run for run in runs if run is not None])
    curves = {run.name: run.metrics for run in named}
    order = sorted(varying_metrics(curves), key=lambda name: (name != "loss", not name.startswith("evaluation/")))
    metrics = list(config.metrics) or order[:_MAX_CURVES]
    unknown = [metric for metric in metrics if not any(metric in record for run in named for record in run.metrics)]
    if unknown:
        logged = sorted({name for run in named for record in run.metrics for name in record} - {"step"})
        raise ConfigError(f"--metrics: no run logged '{unknown[0]}'; these are logged: {', '.join(logged)}.")
    evaluations, differences = _evaluations(named), _differences(named)
    with folder.begin():
        pictures = {"curves.png": training_curves(curves, metrics)} if metrics else {}
        write_pictures(folder.path, pictures)
        report = write_report(folder.path, _report(named, pictures, evaluations, differences))
        content = [{"name": run.name, "last": run.last_evaluation, "settings": run.settings} for run in named]
        write_json(folder.path / _MARKER, {"runs": content, "different": [row[0] for row in differences.rows]})
    for table in (evaluations, differences):
        show(as_text(table) + "\n")
    show(f"Done: {report}")
    return folder.path


def read_run(text: str) -> Run:
    """Read a run folder; NAME=FOLDER names the run. Raises PecobookError."""
    name, _, path = ("", "", text) if Path(text).is_dir() or "=" not in text else text.partition("=")
    folder = Path(path).expanduser()
    try:
        settings = read_json(folder / "config.json")
        metrics = read_metrics(folder / "metrics.jsonl")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"'{folder}' is no run folder: it has no config.json and metrics.jsonl.") from None
    if not metrics:
        raise ConfigError(f"'{folder}' has logged nothing yet.")
    return Run(name or folder.name, _flat(settings), metrics)


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by the names of their flags."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[flag(prefix + name).removeprefix("--")] = value
    return flat


def _named(runs: list[Run]) -> list[Run]:
    """Number the runs whose names are equal."""
    counts: dict[str, int] = {}
    named = []
    for run in runs:
        counts[run.name] = counts.get(run.name, 0) + 1
        named.append(run if counts[run.name] == 1 else run._replace(name=f"{run.name} ({counts[run.name]})"))
    return named


def _evaluations(runs: list[Run]) -> Table:
    last = [run.last_evaluation for run in runs]
    names = list(dict.fromkeys(name for record in last for name in record))
    rows = [(name, *(_number(record.get(name)) for record in last)) for name in names]
    return Table(("last evaluation", *(run.name for run in runs)), tuple(rows))


def _differences(runs: list[Run]) -> Table:
    names = dict.fromkeys(name for run in runs for name in run.settings if name != "out")
    rows = [(name, *(_setting(run.settings.get(name)) for run in runs)) for name in names]
    columns = tuple(range(len(runs) + 1))
    different = tuple(row for row in rows if len(set(row[1:])) > 1)
    return Table(("setting that differs", *(run.name for run in runs)), different, text_columns=columns)


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _setting(value: Any) -> str:
    if value is None or value == "":
        return "-"
    return value if isinstance(value, str) else json.dumps(value)


def _report(runs: list[Run], pictures: dict[str, bytes], evaluations: Table, differences: Table) -> Report:
    caption = "Curves by step. A noisy curve is drawn faintly, and its running mean above it."
    drawn = tuple(Picture(png, caption, f"Training curves of {len(runs)} runs") for png in pictures.values())
    equal = "" if differences.rows else "The runs have equal settings."
    return Report(
        f"{len(runs)} training runs",
        sections=(
            Section("Curves", pictures=drawn, text="" if drawn else "No number was logged at two steps."),
            Section("Last evaluation", table=evaluations),
            Section("Settings", text=equal, table=differences if differences.rows else None),
        ),
    )
