"""All that only a GPU can answer, in order of worth, within a few minutes of one card.

    python -m benchmarks.gpu_session --minutes 12 --out runs/gpu-session
    python -m benchmarks.gpu_session --toy --out runs/gpu-session-toy        # a CPU: checks the script itself

Each part is a process with a deadline of its own, and ends with the session at the latest. What it prints is written at
once to OUT/NAME.txt, and the verdict of each part to OUT/session.jsonl. A part that fails or runs out of time does not
end the others, and a part for which less than its least time is left is named and left out. OUT/summary.txt, which is
written anew after each part and printed at the end, holds the last lines of all. --continue leaves out what is done, so
that a second session takes up where the first one ended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple


class Part(NamedTuple):
    """A command of the session."""

    name: str
    least: float
    """Seconds without which it is not worth starting."""
    most: float
    """Seconds after which it is ended; what it has printed stays."""
    words: tuple[str, ...]
    """The words after `python -m`."""
    toy: tuple[str, ...] = ()
    """The words for a CPU; empty leaves the part out there."""


def bench(name: str, *words: str) -> tuple[str, ...]:
    return (f"benchmarks.{name}", *words)


def pretrain(batch_size: int, *rows: str, repeats: int = 10) -> tuple[str, ...]:
    return bench("pretrain_step", "--batch-size", str(batch_size), "--repeats", str(repeats), "--rows", *rows)


_COMPILED = "pecobook, bf16, compiled"
_SETTINGS = "--attention triton", "--attention triton, --residual bf16"
ROWS = (_COMPILED, *(f"{_COMPILED}, {words}" for words in _SETTINGS))
PEERS = ("pecobook, bf16, compiled", "diffusers and lpips, bf16, compiled")
KERNELS = ("tests/models/test_attention_triton.py", "tests/models/test_nearest_triton.py")
_SHORT = ("--max-steps", "2", "--workers", "0", "--batch-size", "2")
_BLIND = ("--data", "photos", "--image-size", "64", "--overwrite", "--precision", "bf16", "--compile")


def parts(out: Path) -> list[Part]:
    codebook, vit = str(out / "codebook"), str(out / "vit")
    pixels = ("--perceptual.network", "none", "--out", codebook)
    return [
        Part("kernel-tests", 20, 90, ("pytest", "-q", "-m", "gpu", *KERNELS), ("pytest", "-q", KERNELS[0])),
        Part("attention", 15, 60, bench("attention"), bench("attention", "--toy")),
        Part(
            "pretrain-128",
            60,
            240,
            pretrain(128, *ROWS, "transformers, bf16, compiled"),
            pretrain(1, "pecobook, bf16", "transformers, bf16", repeats=1),
        ),
        Part("pretrain-512", 60, 150, pretrain(512, *ROWS)),
        Part("micro", 20, 60, bench("micro"), bench("micro", "--toy")),
        Part(
            "codebook",
            60,
            150,
            bench("codebook_peer", "--batch-size", "64", "--rows", *PEERS),
            bench("codebook_peer", "--batch-size", "1", "--repeats", "1", "--rows", "pecobook, bf16"),
        ),
        Part("pretrain-1024", 60, 120, pretrain(1024, *ROWS)),
        Part(
            "nearest",
            20,
            60,
            bench("nearest", "--device", "cuda"),
            bench("nearest", "--vectors", "64", "--codewords", "64"),
        ),
        Part(
            "train-codebook",
            60,
            100,
            ("pecobook", "codebook", "tiny", *_BLIND, *pixels, "--batch-size", "256", "--max-steps", "1500"),
            ("pecobook", "codebook", "tiny", "--overwrite", *pixels, *_SHORT),
        ),
        Part(
            "train-vit",
            60,
            100,
            ("pecobook", "pretrain", "tiny", *_BLIND, "--tokenizer", codebook, "--out", vit, "--max-steps", "1500"),
            ("pecobook", "pretrain", "tiny", "--overwrite", "--tokenizer", codebook, "--out", vit, *_SHORT),
        ),
        Part(
            "pretrain-autotune",
            90,
            240,
            pretrain(128, f"{_COMPILED}, --compile-mode max-autotune"),
        ),
        Part("gpu-tests", 60, 300, ("pytest", "-q", "-x", "-m", "gpu"), ("pytest", "-q", "-m", "gpu", "tests/engine")),
    ]


def run(name: str, words: tuple[str, ...], out: Path, seconds: float, *, toy: bool) -> str:
    """Run a part for at most so many seconds, with all processes that it starts; return how it ended."""
    with (out / f"{name}.txt").open("w") as text:
        command = [sys.executable, "-u", "-m", *words]
        environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if toy else {})}
        process = subprocess.Popen(
            command, stdout=text, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            code = process.wait(seconds)
            return "done" if not code else f"failed with code {code}"
        except subprocess.TimeoutExpired:
            return f"ended after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def tail(file: Path, lines: int = 16) -> str:
    """Return the last lines that a part has printed, without messages of logs."""
    text = file.read_text(errors="replace") if file.is_file() else ""
    shown = [line for line in text.splitlines() if line.strip() and not re.match(r"[WIE]\d{4} |.*Warning: ", line)]
    return "\n".join(shown[-lines:])


def machine() -> str:
    """Return the GPU, its driver, and the version of PyTorch."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    try:
        gpu = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        gpu = "no GPU of NVIDIA"
    return f"{gpu}; PyTorch {version('torch')}"


def summary(out: Path) -> str:
    """Return the verdicts of all parts of OUT, the last of each, with what the part has printed."""
    rows = {row["part"]: row for row in rows_of(out)}
    texts = [f"== {name}: {row['verdict']} ({row['seconds']:.0f} s)\n{row['tail']}" for name, row in rows.items()]
    return "\n\n".join([machine(), *texts])


def rows_of(out: Path) -> list[dict[str, Any]]:
    file = out / "session.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--out", default="runs/gpu-session")
    parser.add_argument("--only", nargs="+", default=[], help="names of parts")
    parser.add_argument("--toy", action="store_true", help="small sizes, for a CPU")
    parser.add_argument(
        "--continue", action="store_true", dest="again", help="leave out the parts that OUT says are done"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.only) - {part.name for part in parts(Path())}:
        parser.error(f"--only: there are no parts {', '.join(sorted(unknown))}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part that runs is ended too
    start, out = time.monotonic(), Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    done = {row["part"] for row in rows_of(out) if row["verdict"] == "done"} if arguments.again else set()
    for part in parts(out):
        words = part.toy if arguments.toy else part.words
        if (arguments.only and part.name not in arguments.only) or not words or part.name in done:
            continue
        left = 60 * arguments.minutes - (time.monotonic() - start)
        began = time.monotonic()
        verdict = f"left out: {max(left, 0):.0f} s are left"
        if left >= part.least:
            verdict = run(part.name, words, out, min(part.most * (4 if arguments.toy else 1), left), toy=arguments.toy)
        row = {"part": part.name, "verdict": verdict, "seconds": round(time.monotonic() - began, 1), "words": words}
        row["tail"] = "" if verdict.startswith("left out") else tail(out / f"{part.name}.txt")
        with (out / "session.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        (out / "summary.txt").write_text(summary(out) + "\n")
        print(f"{time.monotonic() - start:5.0f} s  {part.name:17s} {verdict}", flush=True)
    print(f"\n{summary(out)}")


if __name__ == "__main__":
    main()
