"""Usage and galleries of a simulated token bank: time and peak memory.

    python -m benchmarks.bank --images 1000000

Codes are drawn by Zipf's law, as few codebooks are worse than, and written in the shards of `pecobook tokenize`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pecobook.commands.analyze.bank import bank_usage, find_places
from pecobook.commands.analyze.pictures import PATCHES, shown_codewords
from pecobook.data.tokens import TokenBank, bank_layouts, write_shard


def simulate(folder: Path, images: int, num_codewords: int) -> None:
    """Write a bank of one view of 14 x 14 codes an image."""
    config = {"kind": "token bank", "grid": [14, 14], "views": 1, "num_images": images, "num_evaluation_images": 0}
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, num_codewords + 1)
    ladder = np.cumsum(share / share.sum())
    layout = bank_layouts(config)["train"]
    for shard in range(layout.num_shards):
        count = len(layout.images_of(shard))
        codes = np.searchsorted(ladder, rng.random((count, 1, 14, 14))).astype(np.uint16)
        write_shard(layout.file(folder, shard), codes.clip(max=num_codewords - 1))


def measure(folder: Path, num_codewords: int) -> None:
    """Print what it takes, in this process."""
    bank = TokenBank(folder)
    began = time.monotonic()
    usage = bank_usage(bank, num_codewords)
    middle = time.monotonic()
    places = find_places(bank, shown_codewords(usage, (), 0), num_codewords, patches=PATCHES, seed=0)
    ended = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{usage.counts.sum():,} codes, {usage.codes_used:,} codewords used")
    print(
        f"usage {middle - began:.1f} s, places of {len(places)} codewords {ended - middle:.1f} s, peak {peak:,.0f} MiB"
    )


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
        own = ["--measure", folder, "--codewords", str(arguments.codewords)]
        subprocess.run([sys.executable, "-m", "benchmarks.bank", *own], check=True)


if __name__ == "__main__":
    main()
