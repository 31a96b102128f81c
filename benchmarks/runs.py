"""What the studies share: pecobook's commands as one-thread processes, side by side, and tables over seeds."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
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

from pecobook.engine.attention import trainable_attention

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


def rows_parser(doc: str | None, rows: Iterable[str], *, batch_size: int, repeats: int) -> argparse.ArgumentParser:
    """What a benchmark of steps is asked: a batch, repeats, rows; with --row it measures that one and prints JSON."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--rows", nargs="+", default=list(rows), choices=list(rows))
    parser.add_argument("--row", default="", help=argparse.SUPPRESS)
    return parser


def peak_bytes(device: torch.device) -> int:
    """The most that was held: by the GPU's allocator, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def rows_apart(module: str, rows: Iterable[str], *words: object) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a benchmark, measured by `module --row ROW` in a process of its own; a row that fails is told of and
    left out.
    """
    for name in rows:
        command = [sys.executable, "-m", module, *map(str, words), "--row", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = (done.stderr if done.returncode else done.stdout).strip().splitlines() or ["no memory"]
        if done.returncode:
            print(f"| {name} | failed: {lines[-1][:120]} |", flush=True)
        else:
            yield name, json.loads(lines[-1])


def median_step(model: nn.Module, loss: Callable[[], Tensor], *, precision: str, warmup: int, repeats: int) -> float:
    """Seconds of a forward, a backward and an AdamW step, the median of `repeats` after `warmup` steps.

    Args:
        model: on its device.
        loss: of the model on inputs that are there already, ().
        precision: fp32 or bf16.
        warmup: steps that are not counted.
        repeats: steps that are.

    pecobook's models train as its loop trains them; others as PyTorch does.
    """
    own = type(model).__module__.partition(".")[0] == "pecobook"
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def step() -> float:
        began = time.perf_counter()
        with trainable_attention(device) if own else nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                value = loss()
            value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        wait()
        return time.perf_counter() - began

    for _ in range(warmup):
        step()
    seconds = sorted(step() for _ in range(repeats))
    return seconds[len(seconds) // 2]
