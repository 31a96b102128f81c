"""Over a long time: memory, open files and shared memory of a stream and of a training, and of an explorer in use."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from tests.campaign.materials import Materials
from tests.campaign.subjects import changed

_STREAM_STEPS = 100_000
_REQUESTS, _AT_ONCE = 200, 50


def measure(out: Path, minutes: float, steps: int = _STREAM_STEPS) -> int:
    """Measure all three and print tables; return 0 when nothing grows."""
    materials = Materials(out.resolve() / "materials")
    materials.codebook.touch()
    lines: list[str] = []
    for part in (_stream(materials, steps), _training(materials, 60 * minutes), _explorer(materials)):
        for line in part:
            print(line, flush=True)
            lines.append(line)
    (out / "long.txt").write_text("\n".join(lines) + "\n")
    return int(any("grows" in line for line in lines))


class _Usage:
    """Memory, open files and shared memory of a process and its children."""

    def __init__(self, pid: int) -> None:
        pids = [pid, *_children(pid)]
        self.megabytes = sum(_proportional_memory(one) for one in pids) / 1024
        self.files = 0
        for one in pids:
            with contextlib.suppress(OSError):
                self.files += len(list(Path(f"/proc/{one}/fd").iterdir()))
        self.shared = len(list(Path("/dev/shm").iterdir()))

    def row(self, what: str) -> str:
        """Return a row of the table."""
        return f"{what:<36}{self.megabytes:>8.0f} MB{self.files:>8} open files{self.shared:>6} in /dev/shm"


def _proportional_memory(pid: int) -> int:
    """Return the memory of a process in kB, in which a page of several processes counts in parts."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


def _children(pid: int) -> list[int]:
    found = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *_children(int(child))]
    return found


def _verdict(first: _Usage, last: _Usage) -> str:
    """Return a sentence on what has grown between a third of the time and the end."""
    grown = []
    if last.megabytes > 1.05 * first.megabytes + 10:
        grown.append(f"memory by {last.megabytes - first.megabytes:.0f} MB")
    if last.files > first.files:
        grown.append(f"open files by {last.files - first.files}")
    return f"grows: {', '.join(grown)}" if grown else "does not grow after a third of the time"


def _stream(materials: Materials, steps: int) -> Iterator[str]:
    """Read batches with two data-loading processes."""
    from pecobook.data.sampler import BatchPositions
    from pecobook.data.stream import Stream, load
    from pecobook.engine.value_range import open_readable
    from pecobook.recipes import recipe
    from pecobook.stages.codebook import CodebookStage

    source = open_readable(str(materials.images)).train
    stream = Stream(source, CodebookStage.view(recipe("codebook", "tiny")), 0)
    positions = BatchPositions(start_step=0, stop_step=steps, batch_size=2, micro_batch_size=2, rank=0, world_size=1)
    usages = []
    began = time.monotonic()
    for step, _ in enumerate(load(stream, positions, workers=2), start=1):
        if step % (steps // 6) == 0:
            usages.append(_Usage(os.getpid()))
            yield usages[-1].row(f"stream, {step:,} steps")
    yield f"stream of {steps:,} steps in {time.monotonic() - began:.0f} s: {_verdict(usages[1], usages[-1])}"


def _training(materials: Materials, seconds: float) -> Iterator[str]:
    """Train for the given time, with data-loading processes, checkpoints, evaluations and TensorBoard."""
    out = materials.folder / "long"
    flags = {"--max-steps": "10000000", "--workers": "2", "--save-every": "50", "--log-every": "10"}
    words = [*changed(materials.words("codebook"), {**flags, "--sample-every": "100"}), "--out", str(out)]
    log = (materials.folder / "long.log").open("w")
    usages, began = [], time.monotonic()
    with subprocess.Popen([sys.executable, "-m", "pecobook", *words], stdout=log, stderr=log) as process:
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").stat().st_size:
            time.sleep(0.1)
        for part in range(1, 7):
            time.sleep(max(began + part * seconds / 6 - time.monotonic(), 0))
            usages.append(_Usage(process.pid))
            yield usages[-1].row(f"training, {_last_step(out):,} steps")
        process.terminate()
    yield f"training of {_last_step(out):,} steps: {_verdict(usages[1], usages[-1])}, exit code {process.returncode}"


def _last_step(out: Path) -> int:
    return int(json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"])


def _explorer(materials: Materials) -> Iterator[str]:
    """Let 50 visitors at once load the page, 200 in all, each with the first image computed for it."""
    port = 17_860
    words = ["explore", str(materials.codebook), "--data", str(materials.images), "--port", str(port)]
    log = materials.folder / "explore.log"
    with log.open("w") as file:
        server = subprocess.Popen([sys.executable, "-m", "pecobook", *words], stdout=file, stderr=file)
    try:
        while f":{port}" not in log.read_text():
            if server.poll() is not None:
                yield f"explorer does not start: {log.read_text()[-300:]}"
                return
            time.sleep(0.1)
        usages = [_Usage(server.pid)]
        yield usages[0].row("explorer, before a request")
        began = time.monotonic()
        for done in range(_AT_ONCE, _REQUESTS + 1, _AT_ONCE):
            failures = _visit(port)
            usages.append(_Usage(server.pid))
            yield usages[-1].row(f"explorer, {done} requests{f', {failures} failed' if failures else ''}")
        yield f"{_REQUESTS} requests, {_AT_ONCE} at once, in {time.monotonic() - began:.0f} s: " + _verdict(
            usages[2], usages[-1]
        )
    finally:
        server.terminate()
        server.wait()


def _request(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 200:
            raise OSError(f"{path}: {answer.status}")
        return content
    finally:
        connection.close()


def _visit(port: int) -> int:
    """Let visitors load the page at the same time; return how many did not get the pictures."""
    failed: list[int] = []

    def visitor(index: int) -> None:
        try:
            _request(port, "/")
            name = quote(json.loads(_request(port, "/api/setup"))["tokenizers"][0]["name"])
            images = json.loads(_request(port, "/api/images?page=0"))["images"]
            image = images[index % len(images)]["image"]
            for path in ("/api/image?", "/picture?kind=restored&", "/picture?kind=error&"):
                _request(port, f"{path}tokenizer={name}&image={image}")
        except OSError:
            failed.append(index)

    threads = [threading.Thread(target=visitor, args=(index,)) for index in range(_AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(failed)
