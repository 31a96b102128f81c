"""Processor seconds until the first step of a training is done, beside those of importing its libraries alone.

    python -m benchmarks.start                       # codebook tiny on the built-in photographs
    python -m benchmarks.start --command pretrain tiny --tokenizer runs/codebook

Every repetition runs each row once, in turn. The seconds are user and system time of the process and of all processes
that it has started, such as those that read images, so other work on the machine changes them little.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

_LIBRARIES = "import torch, torchvision"


def used(session: int) -> float:
    """Return the processor seconds of all processes of a session, and of those that they have waited for."""
    ticks = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended meanwhile
            continue
        if int(fields[3]) == session:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def seconds(arguments: list[str], until: str) -> float:
    """Run Python until a line of its output contains `until`; return its processor seconds by then."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if until in line:
                return used(process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    raise SystemExit("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--command", nargs=argparse.REMAINDER, default=["codebook", "tiny", "--data", "photos"])
    arguments = parser.parse_args()
    command: list[str] = arguments.command
    found: dict[str, list[float]] = {_LIBRARIES: [], f"pecobook {' '.join(command)}, to its first step": []}
    for _ in range(arguments.repetitions):
        with tempfile.TemporaryDirectory() as folder:
            libraries = seconds(["-uc", f"{_LIBRARIES}; print('imported'); input()"], "imported")
            step = seconds(["-um", "pecobook", *command, "--out", f"{folder}/run"], f"{command[0]} 1/")
        for row, value in zip(found.values(), (libraries, step), strict=True):
            row.append(value)
    print("| | processor seconds, median | least | most |\n|---|---|---|---|")
    for name, row in found.items():
        print(f"| `{name}` | {statistics.median(row):.2f} | {min(row):.2f} | {max(row):.2f} |")


if __name__ == "__main__":
    main()
