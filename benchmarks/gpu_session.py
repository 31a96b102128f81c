"""All that only a GPU can answer, in order of worth, within a few minutes of one card.

    python -m benchmarks.gpu_session --minutes 12 --out runs/gpu-session
    python -m benchmarks.gpu_session --toy --out runs/gpu-session-toy        # a CPU: checks the script itself

Each part is a process with a deadline of its own, and ends with the session at the latest. What it prints is written at
once to OUT/NAME.txt, and the verdict of each part to OUT/session.jsonl. A part that fails or runs out of time does not
end the others, and a part for which less than its least time is left is named and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--out", default="runs/gpu-session")
    parser.add_argument("--only", nargs="+", default=[], help="names of parts")
    parser.add_argument("--toy", action="store_true", help="small sizes, for a CPU")
    arguments = parser.parse_args()
    start, out = time.monotonic(), Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for part in parts(out):
        words = part.toy if arguments.toy else part.words
        if (arguments.only and part.name not in arguments.only) or not words:
            continue
        left = 60 * arguments.minutes - (time.monotonic() - start)
        began = time.monotonic()
        verdict = f"left out: {left:.0f} s are left"
        if left >= part.least:
            verdict = run(part.name, words, out, min(part.most, left), toy=arguments.toy)
        row = {"part": part.name, "verdict": verdict, "seconds": round(time.monotonic() - began, 1), "words": words}
        with (out / "session.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{time.monotonic() - start:5.0f} s  {part.name:15s} {verdict}", flush=True)


if __name__ == "__main__":
    main()
