"""Nearest codeword: time and extra memory beside the ways others take, in one run, on this machine.

    python -m benchmarks.nearest                          # a batch of 64 images of 14 x 14 tokens, K 8192, D 256
    python -m benchmarks.nearest --device cuda
    python -m benchmarks.nearest --device cuda --tune     # block sizes, for pecobook.models.nearest_triton

Each method runs in a process of its own. Time is the least of --repeats calls; memory is what the process (or the GPU's
allocator) needed at its peak beyond inputs and libraries; agreement is with fp64 distances on the first 512 vectors.
vector-quantize-pytorch comes with pip install -e ".[dev]".
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Search = Callable[[Tensor], Tensor]


def vector_quantize(codebook: Tensor, *, training: bool) -> Search:
    """vector-quantize-pytorch's module with this codebook; a training forward also updates it."""
    from vector_quantize_pytorch import VectorQuantize

    K, D = codebook.shape
    module = VectorQuantize(dim=D, codebook_size=K, decay=0.99).to(codebook.device)
    module._codebook.embed.data.copy_(codebook[None])
    module._codebook.initted.fill_(True)
    module.train(training)
    return lambda z: module(z[None])[1][0]


def ours(codebook: Tensor, precision: str = "fp32") -> Search:
    from pecobook import nearest_codeword

    return lambda z: nearest_codeword(z, codebook, precision=precision)  # type: ignore[arg-type]


def chunks(codebook: Tensor) -> Search:
    from pecobook.models.nearest import _nearest_by_chunks

    return lambda z: _nearest_by_chunks(z, codebook)


METHODS: dict[str, Callable[[Tensor], Search]] = {
    "pecobook": ours,
    "pecobook, tf32": lambda codebook: ours(codebook, "tf32"),
    "pecobook, bf16": lambda codebook: ours(codebook, "bf16"),
    "pecobook, fp32 chunks": chunks,
    "matmul alone": lambda codebook: lambda z: z @ codebook.t(),
    "matmul and argmin": lambda codebook: (
        lambda z: torch.addmm(codebook.square().sum(1) / 2, z, codebook.t(), alpha=-1).argmin(1)
    ),
    "torch.cdist and argmin": lambda codebook: lambda z: torch.cdist(z, codebook).argmin(1),
    "vector-quantize-pytorch, evaluation": lambda codebook: vector_quantize(codebook, training=False),
    "vector-quantize-pytorch, training": lambda codebook: vector_quantize(codebook, training=True),
}
GPU_ONLY = ("pecobook, tf32", "pecobook, bf16")


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    torch.set_grad_enabled(False)
    z = torch.randn(arguments.vectors, arguments.dim, device=device)
    codebook = torch.randn(arguments.codewords, arguments.dim, device=device)
    search = METHODS[name](codebook)
    search(z[:512])  # loads libraries and compiles kernels
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    memory = _peak(device)
    found = search(z)
    wait()
    extra = _peak(device) - memory
    seconds = []
    for _ in range(arguments.repeats):
        began = time.perf_counter()
        found = search(z)
        wait()
        seconds.append(time.perf_counter() - began)
    agreement = None
    if name != "matmul alone":
        exact = torch.cdist(z[:512].double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        agreement = float((found[:512] == exact).double().mean()) if "training" not in name else None
    return {"name": name, "ms": 1000 * min(seconds), "mib": extra / 2**20, "agreement": agreement}


def candidates(precision: str) -> list[dict[str, Any]]:
    """Settings of the CUDA kernel worth a try."""
    names = "PRECISION", "BLOCK_N", "BLOCK_K", "BLOCK_D", "num_warps", "num_stages"
    grids: dict[str, list[tuple[Sequence[Any], ...]]] = {
        "fp32": [
            (("ieee",), (32, 64, 128), (64, 128), (16, 32), (4, 8), (2, 3)),
            (("tf32x3",), (64, 128), (64, 128), (32, 64), (4, 8), (2, 3)),
        ],
        "tf32": [(("tf32",), (64, 128), (128, 256), (32, 64), (4, 8), (3, 4))],
        "bf16": [(("ieee",), (64, 128), (128, 256), (64, 128), (4, 8), (3, 4))],
    }
    return [dict(zip(names, chosen, strict=True)) for grid in grids[precision] for chosen in itertools.product(*grid)]


def tune(arguments: argparse.Namespace) -> None:
    """Time the CUDA kernel with many block sizes."""
    from pecobook.models.nearest_triton import nearest_fused

    z, codebook = (torch.randn(n, arguments.dim, device="cuda") for n in (arguments.vectors, arguments.codewords))
    columns = "precision", "products", "BLOCK_N", "BLOCK_K", "BLOCK_D", "warps", "stages", "ms"
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for precision in ("fp32", "tf32", "bf16"):
        rows = []
        for tiles in candidates(precision):
            try:
                seconds = _time(partial(nearest_fused, z, codebook, precision, tiles), arguments.repeats)
            except Exception:  # too much shared memory, or a shape the compiler refuses
                continue
            rows.append((seconds, tiles))
        for seconds, tiles in sorted(rows, key=lambda row: row[0])[:8]:
            print(f"| {precision} | {' | '.join(map(str, tiles.values()))} | {1000 * seconds:.3f} |", flush=True)


def _time(function: Callable[[], object], repeats: int) -> float:
    function()
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _peak(device: torch.device) -> int:
    """Bytes at the peak so far; on a GPU, since the last call."""
    if device.type != "cuda":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vectors", type=int, default=12_544)
    parser.add_argument("--codewords", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--method", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tune:
        tune(arguments)
        return
    if arguments.method:
        print(json.dumps(measure(arguments.method, arguments)))
        return
    print("| method | ms | extra peak MiB | equal indices |\n|---|---|---|---|")
    for name in METHODS:
        if arguments.device == "cpu" and name in GPU_ONLY:
            continue
        command = [sys.executable, "-m", "benchmarks.nearest", *sys.argv[1:], "--method", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"| {name} | failed: {done.stderr.strip().splitlines()[-1]} | | |", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        agreement = "-" if row["agreement"] is None else f"{row['agreement']:.4f}"
        print(f"| {row['name']} | {row['ms']:.3g} | {row['mib']:.0f} | {agreement} |", flush=True)


if __name__ == "__main__":
    main()
