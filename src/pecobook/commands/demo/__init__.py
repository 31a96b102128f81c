"""`pecobook demo`: the paper's comparison, with a control, on any images, in minutes.

plan.py     defines the runs, their settings and their order
measure.py  measures the runs on held-out images with the functions of `pecobook analyze`, which also write the page
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from pecobook.analysis.report import write_pictures, write_report
from pecobook.commands.analyze.page import compose
from pecobook.commands.demo.measure import measure
from pecobook.commands.demo.plan import plan
from pecobook.commands.jobs import run_all, seconds_of
from pecobook.commands.resumed_folder import begin_or_resume, resumed_folder
from pecobook.engine.log import compact_duration
from pecobook.engine.preamble import show_source
from pecobook.engine.value_range import open_readable
from pecobook.errors import Preflight
from pecobook.settings.demo import DemoConfig
from pecobook.settings.values import replace, to_dict
from pecobook.utils.extras import require
from pecobook.utils.files import write_json
from pecobook.utils.output_folder import OutputFolder
from pecobook.utils.printer import show

_MARK = "demo.json"


def demo(config: DemoConfig | None = None, **settings: Any) -> Path:
    """Train and measure all runs, write `results.json`, `pictures/` and `report.html`, and return the report's path.

    Raises:
        PreflightError: lists all problems that were found before anything was written.
        PecobookError: a run failed.
    """
    config = replace(config or DemoConfig(), settings)
    folder, preflight = _folder(config), Preflight()
    preflight.check(lambda: require("analysis", "pecobook demo"))
    preflight.check(folder.check)
    splits = preflight.check(lambda: open_readable(config.data, config.value_range))
    preflight.finish()
    assert splits is not None
    show_source(splits)
    with begin_or_resume(folder, config, splits, _fixed_settings(config)):
        return _write_all(config)


def _write_all(config: DemoConfig) -> Path:
    out = Path(config.out)
    began = time.monotonic()
    jobs = plan(config)
    run_all(jobs, out).check(out)
    cost = seconds_of(jobs)
    show("measuring on held-out images")
    measuring_began = time.monotonic()
    # One thread: more threads do not speed up small matrices, and they are slow if another process is busy.
    from threadpoolctl import threadpool_limits  # scikit-learn installs it

    with threadpool_limits(1):
        results, pictures, atlases = measure(config, jobs)
    cost["measuring"] = time.monotonic() - measuring_began
    results["seconds"] = round(time.monotonic() - began, 1)
    write_pictures(out, pictures)
    renamed = {"codebooks" if key == "tokenizers" else key: value for key, value in results.items()}
    write_json(out / "results.json", renamed)
    page = compose(
        results,
        pictures,
        list(cost.items()),
        {"demo": to_dict(config), **{name: to_dict(job.config) for name, job in jobs.items()}},
        title="Three codebooks, the same images",
        subtitle="What image tokens represent if a codebook is trained with a pixel loss, "
        "and if it is trained with a perceptual loss too.",
        atlases=atlases,
    )
    report = write_report(out, page)
    show(f"\nDone in {compact_duration(results['seconds'])}: open {report}")
    return report


def _fixed_settings(config: DemoConfig) -> dict[str, Any]:
    """Return the settings that must not change when a folder is resumed."""
    return to_dict(dataclasses.replace(config, verify_data=False, accept_data_change=False))


def _folder(config: DemoConfig) -> OutputFolder:
    settings, defaults = _fixed_settings(config), _fixed_settings(DemoConfig())
    return resumed_folder(
        config.out, settings, defaults, data=config.data, example="runs/demo", kind="a demo", marker=_MARK
    )
