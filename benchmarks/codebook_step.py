"""What a training step of the codebook costs, and what of it the frozen perceptual network: time and memory.

    python -m benchmarks.codebook_step --batch-size 2                     # on a CPU, minutes
    python -m benchmarks.codebook_step --batch-size 128 --precision bf16  # on a GPU

The paper's tokenizer at 224 pixels with random data and random weights, one process a row. `perceptual` is the share of
a row's time beyond that of the row without a network. Memory is the peak of the process, or of the GPU's allocator.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch

from benchmarks.runs import peak_bytes, rows_apart

NETWORKS = {
    "none": ("none", ("1",)),
    "ViT-B, blocks 3 6 9 12": ("timm:vit_base_patch16_224", ("3", "6", "9", "12")),
    "ResNet-50, stages 1 to 4": ("timm:resnet50", ("1", "2", "3", "4")),
    "VGG-16, stages 1 to 5": ("torchvision:vgg16", ("1", "2", "3", "4", "5")),
}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    from pecobook.config import replace
    from pecobook.engine.optim import build_optimizer
    from pecobook.recipes import recipe
    from pecobook.stages.codebook import CodebookStage

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, layers = NETWORKS[name]
    chosen = {"perceptual.network": network, "perceptual.layers": layers, "perceptual.weights": "random"}
    config = replace(recipe("codebook", arguments.recipe), {**chosen, "quantizer.revive_after": 0})
    torch.manual_seed(0)
    stage = CodebookStage(config).to(device).train()
    stage.tokenizer.quantizer._started = True  # the codebook's start is not part of a step
    if arguments.compile:
        stage.compile()
    optimizer = build_optimizer(stage.parameter_groups(config.optim), config.optim)
    side = config.image_size
    batch = {"image": torch.randint(256, (arguments.batch_size, 3, side, side), dtype=torch.uint8, device=device)}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def step() -> float:
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
            loss = stage(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        stage.after_step(1, 2)
        wait()
        return time.perf_counter() - began

    for _ in range(arguments.warmup):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = min(step() for _ in range(arguments.repeats))
    return {"seconds": seconds, "mib": peak_bytes(device) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="paper")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--row", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.row, arguments)))
        return
    print("| perceptual network | s/step | images/s | perceptual | peak MiB |\n|---|---|---|---|---|")
    plain = 0.0
    for name, row in rows_apart("benchmarks.codebook_step", NETWORKS, *sys.argv[1:]):
        plain = plain or row["seconds"]
        share = 1 - plain / row["seconds"]
        speed = arguments.batch_size / row["seconds"]
        print(f"| {name} | {row['seconds']:.2f} | {speed:.2f} | {share:.0%} | {row['mib']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
