"""What the studies share: pecobook's commands as one-thread processes, side by side, and tables over seeds."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def command(*words: str) -> None:
    """Run a pecobook command in a one-thread process."""
    done = subprocess.run(
        [sys.executable, "-m", "pecobook", *words], env=ONE_THREAD, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"pecobook {' '.join(words)} failed:\n{done.stderr[-2000:]}")


def side_by_side(jobs: Iterable[Callable[[], object]], processes: int) -> None:
    """Run jobs in threads, each of which waits for a process."""
    with ThreadPoolExecutor(processes) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


def records(folder: Path) -> list[dict[str, Any]]:
    """The results written beside runs."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def table(
    rows: list[dict[str, Any]], keys: list[str], titles: dict[str, str], order: Callable[[tuple[Any, ...]], Any]
) -> str:
    """Markdown: mean and standard deviation over seeds of `titles`, a row for each value of `keys`."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    lines = [f"| {' | '.join(keys)} | seeds | {' | '.join(titles.values())} |"]
    lines.append("|" + "---|" * (len(keys) + 1 + len(titles)))
    for key in sorted(found, key=order):
        cells = [cell([row.get(name) for row in found[key]]) for name in titles]
        lines.append(f"| {' | '.join(map(str, key))} | {len(found[key])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: list[float | None]) -> str:
    """`mean ± standard deviation`, or a dash."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-"
    spread = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.2f}{spread}"
