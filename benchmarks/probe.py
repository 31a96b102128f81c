"""Linear probe and k-NN of ImageNet's 1.28 million training images: time, and memory beyond the features.

    python -m benchmarks.probe --iterations 2        # on a CPU; the k-NN of 50,000 images takes 100 times that of 500

The features are random, in half precision as `pecobook probe` keeps them: 1.28 million x 384, 1 GB.
"""

from __future__ import annotations

import argparse
import threading
import time
from pathlib import Path

import torch

from pecobook.analysis import probe as probing
from pecobook.analysis.probe import knn_probe, linear_probe


def resident() -> float:
    """Return the bytes of memory that this process holds, in GB."""
    fields = Path("/proc/self/statm").read_text().split()
    return 4096 * int(fields[1]) / 1e9


class Peak:
    """The largest memory within a context, GB."""

    def __enter__(self) -> Peak:
        self.before, self.largest, self._done = resident(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self.began = time.perf_counter()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.largest = max(self.largest, resident())

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.began
        self._done.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--features", type=int, default=384)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--test", type=int, default=500)
    parser.add_argument("--iterations", type=int, default=200)
    arguments = parser.parse_args()
    probing._MAX_ITER = arguments.iterations
    probing.C_GRID = (1e-3,) * 5
    torch.manual_seed(0)
    shape = arguments.images, arguments.features
    train, test = torch.empty(shape, dtype=torch.float16), torch.randn(arguments.test, shape[1]).half()
    for part in torch.split(train, 2**14):
        part.copy_(torch.randn(part.shape))
    labels, test_labels = (torch.randint(arguments.classes, (len(part),)) for part in (train, test))
    print(
        f"| {shape[0]:,} x {shape[1]}: {train.nbytes / 1e9:.2f} GB | seconds | GB beyond the features |\n|---|---|---|"
    )
    for name, measure in (("k-NN", knn_probe), ("linear", linear_probe)):
        with Peak() as peak:
            result = measure(train, labels, test, test_labels)
        print(f"| {name} {result.setting} | {peak.seconds:.0f} | {peak.largest - peak.before:.2f} |", flush=True)


if __name__ == "__main__":
    main()
