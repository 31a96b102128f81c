"""Nearest codeword: time and extra memory of several methods, in one run on this machine.

    python -m benchmarks.nearest                          # a batch of 64 images of 14 x 14 tokens, K 8192, D 256
    python -m benchmarks.nearest --device cuda
    python -m benchmarks.nearest --device cuda --tune     # block sizes, for pecobook.models.nearest_triton

Each method runs in a separate process. Time is that of the fastest of --repeats calls. Memory is the peak of the
process (or of the GPU's allocator) beyond inputs and libraries. Agreement is with fp64 distances on the first 512
vectors. vector-quantize-pytorch comes with pip install -e ".[dev]".
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.runs import least_seconds, measured_rows
from pecobook.utils.devices import peak_memory, synchronize

Search = Callable[[Tensor], Tensor]


def vector_quantize(codebook: Tensor, *, training: bool) -> Search:
    """Return the search of vector-quantize-pytorch's module; a forward in training also updates the codebook."""
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
    from pecobook.models.nearest import nearest_by_chunks

    return lambda z: nearest_by_chunks(z, codebook)


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
    synchronize(device)
    memory = peak_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    indices = search(z)
    synchronize(device)
    extra = peak_memory(device) - memory
    seconds = least_seconds(lambda: search(z), device, repeats=arguments.repeats)
    agreement = None
    if name != "matmul alone":
        exact = torch.cdist(z[:512].double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        agreement = float((indices[:512] == exact).double().mean()) if "training" not in name else None
    return {"ms": 1000 * seconds, "mib": extra / 2**20, "agreement": agreement}


def candidates(precision: str) -> list[dict[str, Any]]:
    """Return the settings of the CUDA kernel that `tune` tries."""
    names = "PRECISION", "BLOCK_N", "BLOCK_K", "BLOCK_D", "num_warps", "num_stages"
    grids: dict[str, list[tuple[Sequence[Any], ...]]] = {
        "fp32": [
            (("ieee",), (32, 64, 128), (64, 128), (16, 32), (4, 8), (2, 3)),
            (("tf32x3",), (64, 128), (64, 128), (32, 64), (4, 8), (2, 3)),
        ],
        "tf32": [(("tf32",), (64, 128), (128, 256), (32, 64), (4, 8), (3, 4))],
        "bf16": [(("ieee",), (64, 128), (128, 256), (64, 128), (4, 8), (3, 4))],
    }
    return [dict(zip(names, values, strict=True)) for grid in grids[precision] for values in itertools.product(*grid)]


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
                search = partial(nearest_fused, z, codebook, precision, tiles)
                seconds = least_seconds(search, z.device, repeats=arguments.repeats)
            except Exception:  # too much shared memory, or a shape that the compiler refuses
                continue
            rows.append((seconds, tiles))
        for seconds, tiles in sorted(rows, key=lambda row: row[0])[:8]:
            print(f"| {precision} | {' | '.join(map(str, tiles.values()))} | {1000 * seconds:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vectors", type=int, default=12_544)
    parser.add_argument("--codewords", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--row", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tune:
        tune(arguments)
        return
    if arguments.row:
        print(json.dumps(measure(arguments.row, arguments)))
        return
    print("| method | ms | extra peak MiB | equal indices |\n|---|---|---|---|")
    methods = [name for name in METHODS if arguments.device != "cpu" or name not in GPU_ONLY]
    for name, row in measured_rows("benchmarks.nearest", methods, *sys.argv[1:]):
        agreement = "-" if row["agreement"] is None else f"{row['agreement']:.4f}"
        print(f"| {name} | {row['ms']:.3g} | {row['mib']:.0f} | {agreement} |", flush=True)


if __name__ == "__main__":
    main()
