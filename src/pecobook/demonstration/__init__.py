"""`pecobook demo`: the paper's story, with its control, on any images, in minutes.

plan.py      what is trained, with which settings and in which order
runner.py    the runs, side by side as processes, with progress; an interrupted demo goes on
evaluate.py  what is measured on held-out images, and the pictures
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pecobook.config import replace
from pecobook.demonstration.plan import DemoConfig, Job, plan

__all__ = ["DemoConfig", "demo"]


def demo(config: DemoConfig | None = None, **settings: Any) -> Path:
    """Train everything, measure it, write `results.json`, `pictures/` and `report.html`; returns the report's path.

    Raises:
        PecobookError: bad data or output folder, before anything is written; or a run that failed.
    """
    from threadpoolctl import threadpool_limits

    from pecobook.analysis.report import write_report
    from pecobook.analysis.story import demo_report
    from pecobook.demonstration import evaluate, runner
    from pecobook.files import write_atomically

    config = replace(config or DemoConfig(), settings)
    out = Path(config.out)
    runner.check(config)
    began = time.monotonic()
    jobs = plan(config)
    cost = runner.train_all(jobs, out)
    runner.say("measuring on held-out images")
    measuring = time.monotonic()
    # One thread: small matrices gain nothing from more, and lose much where another process is busy.
    with threadpool_limits(1):
        results, pictures, curves = evaluate.measure(config, jobs)
    cost["measuring"] = time.monotonic() - measuring
    results["seconds"] = round(time.monotonic() - began, 1)
    (out / "pictures").mkdir(exist_ok=True)
    for name, png in pictures.items():
        (out / "pictures" / f"{name.replace(':', '-')}.png").write_bytes(png)
    write_atomically(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    report = write_report(out, demo_report(results, pictures, list(cost.items()), _settings(config, jobs), curves))
    runner.say(f"\nDone in {runner.duration(results['seconds'])}: open {report}")
    return report


def _settings(config: DemoConfig, jobs: dict[str, Job]) -> dict[str, Any]:
    from pecobook.config import to_dict

    return {"demo": to_dict(config), **{name: to_dict(job.config) for name, job in jobs.items()}}
