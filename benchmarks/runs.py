"""Shared by the benchmarks: pecobook commands as one-thread processes, timed steps, and tables over seeds."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecobook.analysis.evidence import difference, family, mean_and_deviation
from pecobook.engine.attention import trainable_attention
from pecobook.settings.training import AttentionKernel
from pecobook.utils.devices import synchronize

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def command(*words: str) -> None:
    """Run a pecobook command in a one-thread process."""
    process = subprocess.run(
        [sys.executable, "-m", "pecobook", *words], env=ONE_THREAD, capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise SystemExit(f"pecobook {' '.join(words)} failed:\n{process.stderr[-2000:]}")


def run_parallel(jobs: Iterable[Callable[[], object]], processes: int) -> None:
    """Run jobs in threads; each thread waits for a process."""
    with ThreadPoolExecutor(processes) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


def records(folder: Path) -> list[dict[str, Any]]:
    """Read the results that stand as JSON files next to the run folders."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def table(
    rows: list[dict[str, Any]], keys: list[str], titles: dict[str, str], order: Callable[[tuple[Any, ...]], Any]
) -> str:
    """Return Markdown with mean and standard deviation over seeds.

    Args:
        rows: results, one per run.
        keys: names of the values that identify an arm; each combination of the values is a row of the table.
        titles: metric to the title of the column.
        order: sort key of the rows, a function of the values of `keys`.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    lines = [f"| {' | '.join(keys)} | seeds | {' | '.join(titles.values())} |"]
    lines.append("|" + "---|" * (len(keys) + 1 + len(titles)))
    for values in sorted(groups, key=order):
        group = groups[values]
        metrics = [[row[name] for row in group if row.get(name) is not None] for name in titles]
        cells = [mean_and_deviation(metric, digits=2) for metric in metrics]
        lines.append(f"| {' | '.join(map(str, values))} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(rows: list[dict[str, Any]], pairs: Iterable[tuple[str, str]], titles: dict[str, str]) -> str:
    """Return lines on the differences of arms, paired by seed, with intervals and one correction for each metric.

    Args:
        rows: results, one per run, with `arm` and `seed`.
        pairs: arms (a, b), for a - b; arms that were not run are left out.
        titles: metric to its title.
    """
    lines = []
    for metric, title in titles.items():
        by_arm: dict[str, dict[int, float]] = {}
        for row in rows:
            if row.get(metric) is not None:
                by_arm.setdefault(row["arm"], {})[row["seed"]] = row[metric]
        pairs_run = [(a, b) for a, b in pairs if a in by_arm and b in by_arm]
        members = [difference(f"{title}: {a} minus {b}", by_arm[a], by_arm[b]) for a, b in pairs_run]
        lines += [f"- {member.sentence()}" for member in family(members)]
    return "\n".join(lines)


def study_parser(doc: str | None, *, codebooks_help: str = "") -> argparse.ArgumentParser:
    """Return the flags of all studies; with `codebooks_help` also those of the runs that the arms start from."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pixel", "control", "perceptual") if codebooks_help else ():
        parser.add_argument(f"--{name}", default="", help=codebooks_help)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=2, help="number of parallel runs")
    parser.add_argument("--table", action="store_true", help="print the table of the finished runs, train nothing")
    return parser


def rows_parser(doc: str | None, rows: Iterable[str], *, batch_size: int, repeats: int) -> argparse.ArgumentParser:
    """Return the flags of all benchmarks of steps; with --row the benchmark measures one row and prints JSON."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--rows", nargs="+", default=list(rows), choices=list(rows))
    parser.add_argument("--row", default="", help=argparse.SUPPRESS)
    return parser


def measured_rows(module: str, rows: Iterable[str], *words: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure each row of a benchmark by `module --row ROW` in a separate process.

    A row that fails is printed with the last line of the error and left out.
    """
    for name in rows:
        command = [sys.executable, "-m", module, *map(str, words), "--row", name]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        output = process.stderr if process.returncode else process.stdout
        lines = output.strip().splitlines() or ["no memory"]
        if process.returncode:
            print(f"| {name} | failed: {lines[-1][:120]} |", flush=True)
        else:
            yield name, json.loads(lines[-1])


def least_seconds(function: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """Return the seconds of the fastest of `repeats` calls, after a call that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def median_step(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    precision: str,
    warmup: int,
    repeats: int,
    attention: AttentionKernel = "sdpa",
    clip: float = 0.0,
) -> float:
    """Return the seconds of a forward, a backward and an AdamW step: the median of `repeats` steps.

    pecobook's models are trained as in pecobook's loop, with the same attention kernels; other models as PyTorch does.

    Args:
        model: a model on its device.
        loss: computes the loss of the model, (), on inputs that are on the device already.
        precision: fp32 or bf16.
        warmup: number of steps before, which are not counted.
        repeats: number of measured steps.
        attention: kernel of attention, as `--attention`.
        clip: largest norm of the gradient; 0 does not clip.
    """
    is_ours = type(model).__module__.partition(".")[0] == "pecobook"
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        start = time.perf_counter()
        with trainable_attention(device, attention) if is_ours else nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                value = loss()
            value.backward()  # type: ignore[no-untyped-call]
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        return time.perf_counter() - start

    for _ in range(warmup):
        step()
    seconds = sorted(step() for _ in range(repeats))
    return seconds[len(seconds) // 2]
