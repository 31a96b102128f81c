"""Time and memory of a training step of the codebook, and the share of the frozen perceptual network.

    python -m benchmarks.codebook_step --batch-size 2                     # on a CPU, minutes
    python -m benchmarks.codebook_step --batch-size 128 --precision bf16  # on a GPU

The rows are the paper's tokenizer at 224 pixels with random images and random weights, each in a separate process. The
column `perceptual` is the share of a row's time that the row without a network saves. Memory is the peak of the
process, or of the GPU's allocator.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from benchmarks.codebook_peer import codebook_stage, our_loss
from benchmarks.runs import measured_rows, median_step, rows_parser
from pecobook.utils import devices

NETWORKS = {
    "none": ("none", ("1",)),
    "ViT-B, blocks 3 6 9 12": ("timm:vit_base_patch16_224", ("3", "6", "9", "12")),
    "ResNet-50, stages 1 to 4": ("timm:resnet50", ("1", "2", "3", "4")),
    "VGG-16, stages 1 to 5": ("torchvision:vgg16", ("1", "2", "3", "4", "5")),
}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    device = devices.device()
    network, layers = NETWORKS[name]
    settings = {"perceptual.network": network, "perceptual.layers": layers, "perceptual.weights": "random"}
    torch.manual_seed(0)
    stage = codebook_stage(arguments.recipe, {**settings, "quantizer.revive_after": 0}).to(device).train()
    if arguments.compile:
        stage.compile()
    size = stage.config.image_size
    images = torch.randint(256, (arguments.batch_size, 3, size, size), dtype=torch.uint8, device=device)
    options = {"precision": arguments.precision, "warmup": arguments.warmup, "repeats": arguments.repeats}
    seconds = median_step(stage, our_loss(stage, images), **options)
    return {"seconds": seconds, "mib": devices.peak_memory(device) / 2**20}


def main() -> None:
    parser = rows_parser(__doc__, NETWORKS, batch_size=2, repeats=3)
    parser.add_argument("--recipe", default="paper")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--warmup", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.row, arguments)))
        return
    print("| perceptual network | s/step | images/s | perceptual | peak MiB |\n|---|---|---|---|---|")
    without_network = 0.0
    for name, row in measured_rows("benchmarks.codebook_step", arguments.rows, *sys.argv[1:]):
        without_network = row["seconds"] if name == "none" else without_network
        share = f"{1 - without_network / row['seconds']:.0%}" if without_network else "-"
        speed = arguments.batch_size / row["seconds"]
        print(f"| {name} | {row['seconds']:.3g} | {speed:.3g} | {share} | {row['mib']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
