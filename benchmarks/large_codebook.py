"""A training step of a quantizer with a very large codebook: time and memory of ours and of vector-quantize-pytorch.

    python -m benchmarks.large_codebook                      # 16 images of 14 x 14 tokens, K 262,144, D 256
    python -m benchmarks.large_codebook --codewords 65536 --dim 8 --normalise

Each row is a process of its own, which fails where it needs more than --limit GiB. Time is CPU time on one thread, or
the wall time on a GPU. A step is the forward pass in training and the update of the codebook, which starts as
random vectors, as k-means is not part of a step. Memory is the peak of the process beyond libraries and vectors: the
codebook with its statistics, and what a step adds to it. IBQ's row is arithmetic, in fp32: its softmax over all
codewords keeps N x K numbers for the backward pass, in the published code four times over (logits, probabilities and
the one-hot matrices), beside codebook, gradient and Adam's two moments.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.runs import measured_rows
from pecobook.utils.devices import peak_memory, synchronize


def ours(arguments: argparse.Namespace) -> Callable[[Tensor], None]:
    from pecobook import VectorQuantizer

    quantizer = VectorQuantizer(arguments.codewords, arguments.dim, normalise=arguments.normalise)
    quantizer._initialised = True
    quantizer.to(arguments.device)

    def step(z: Tensor) -> None:
        quantizer(z)
        quantizer.update()

    return step


def peer(arguments: argparse.Namespace) -> Callable[[Tensor], None]:
    from vector_quantize_pytorch import VectorQuantize

    K, D = arguments.codewords, arguments.dim
    module = VectorQuantize(
        dim=D, codebook_size=K, decay=0.99, use_cosine_sim=arguments.normalise, accept_image_fmap=True
    ).to(arguments.device)

    def step(z: Tensor) -> None:
        module(z)

    return step


METHODS = {"pecobook": ours, "vector-quantize-pytorch": peer}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    torch.set_grad_enabled(False)
    if arguments.limit:
        resource.setrlimit(resource.RLIMIT_AS, (int(arguments.limit * 2**30),) * 2)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    z = torch.randn(arguments.vectors // 196, arguments.dim, 14, 14, device=device)
    before = peak_memory(device)
    step = METHODS[name](arguments)
    built = peak_memory(device)
    seconds = []
    for _ in range(arguments.steps):
        began = clock()
        step(z)
        synchronize(device)
        seconds.append(clock() - began)
    return {"s": min(seconds), "built": (built - before) / 2**20, "mib": (peak_memory(device) - before) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vectors", type=int, default=3136)
    parser.add_argument("--codewords", type=int, default=262_144)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--normalise", action="store_true")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--limit", type=float, default=0.0, help="GiB of a process, its libraries included; 0 for all")
    parser.add_argument("--row", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.row, arguments)))
        return
    N, K, D = arguments.vectors, arguments.codewords, arguments.dim
    print("| quantizer | s a step | MiB when built | peak MiB |\n|---|---|---|---|")
    for name, row in measured_rows("benchmarks.large_codebook", list(METHODS), *sys.argv[1:]):
        print(f"| {name} | {row['s']:.3g} | {row['built']:.0f} | {row['mib']:.0f} |", flush=True)
    print(f"| IBQ, arithmetic | - | {4 * 4 * K * D / 2**20:.0f} | {4 * (4 * K * D + 4 * N * K) / 2**20:.0f} |")


if __name__ == "__main__":
    main()
