"""Time and peak memory of the usage and the galleries of a simulated token bank.

    python -m benchmarks.bank --images 1000000

The codes follow Zipf's law, a distribution about as uneven as that of any codebook, and are written in the same shards
as by `pecobook tokenize`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from pecobook.commands.analyze.bank import bank_usage, find_occurrences
from pecobook.commands.analyze.pictures import PATCHES, gallery_codewords
from pecobook.data.tokens import TokenBank, bank_layouts, write_shard
from pecobook.data.views import NamedViews
from pecobook.settings.pretrain import PretrainConfig
from pecobook.utils.devices import peak_memory


def simulate(folder: Path, images: int, num_codewords: int) -> None:
    """Write a bank with one view of 14 x 14 codes per image."""
    config = {"kind": "token bank", "grid": [14, 14], "views": 1, "num_images": images, "num_evaluation_images": 1}
    config |= {"tokenizer": "", "data": "", "evaluation_data": "", **NamedViews.of(PretrainConfig()).settings()}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    frequencies = 1 / np.arange(1, num_codewords + 1)
    cumulative = np.cumsum(frequencies / frequencies.sum())
    layout = bank_layouts(config)["train"]
    for shard in range(layout.num_shards):
        count = len(layout.images_of(shard))
        codes = np.searchsorted(cumulative, rng.random((count, 1, 14, 14))).astype(np.uint16)
        write_shard(layout.file(folder, shard), codes.clip(max=num_codewords - 1))


def measure(folder: Path, num_codewords: int) -> None:
    """Print the time and the memory that this process takes."""
    bank = TokenBank(folder)
    start = time.monotonic()
    usage = bank_usage(bank, num_codewords)
    middle = time.monotonic()
    codewords = gallery_codewords(usage, (), 0)
    occurrences = find_occurrences(bank, codewords, num_codewords, patches=PATCHES, seed=0)
    end = time.monotonic()
    peak = peak_memory(torch.device("cpu")) / 2**20
    print(f"{usage.counts.sum():,} codes, {usage.codes_used:,} codewords used")
    print(f"usage {middle - start:.1f} s, occurrences of {len(occurrences)} codewords {end - middle:.1f} s")
    print(f"peak {peak:,.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--codewords", type=int, default=8192)
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(Path(arguments.measure), arguments.codewords)
        return
    with tempfile.TemporaryDirectory() as folder:
        simulate(Path(folder), arguments.images, arguments.codewords)
        flags = ["--measure", folder, "--codewords", str(arguments.codewords)]
        subprocess.run([sys.executable, "-m", "benchmarks.bank", *flags], check=True)


if __name__ == "__main__":
    main()
