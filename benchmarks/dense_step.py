"""A training step of segmentation at 512 pixels and of detection at 800 pixels, ViT-B/16: time and memory.

    python -m benchmarks.dense_step --batch-size 1 --repeats 2       # on a CPU
    python -m benchmarks.dense_step --batch-size 8 --repeats 10      # on a GPU

Segmentation is compared with transformers' BeitForSemanticSegmentation: equal blocks, heads, batch and classes, a table
of relative positions in every block. Detection has no such peer; the rows show the effect of windows and checkpointing.
Each row is a process: forward, backward, AdamW; images and weights are random. Memory is the peak of the process, or of
the GPU's allocator.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.runs import measured_rows, median_step, rows_parser
from pecobook.utils import devices

NUM_CLASSES, SIZE = 150, 512
MEAN = STD = (0.5, 0.5, 0.5)
ModelAndLoss = tuple[nn.Module, Callable[[], Tensor]]


def pyramid(size: int, **config: Any) -> Any:
    import timm

    from pecobook.models.dense.pyramid import FeaturePyramid
    from pecobook.settings.dense import PyramidConfig

    network = timm.create_model("beit_base_patch16_224", num_classes=0, drop_path_rate=0.1)
    return FeaturePyramid(network, size, PyramidConfig(**config))


def segment(batch: int, device: torch.device, **config: Any) -> ModelAndLoss:
    from pecobook.models.dense.segmenter import Segmenter, resize_maps

    names = tuple(str(number) for number in range(NUM_CLASSES))
    model = Segmenter(pyramid(SIZE, **config), {"image_size": SIZE, "mean": MEAN, "std": STD}, classes=names)
    images = torch.rand(batch, 3, SIZE, SIZE, device=device)
    targets = torch.randint(NUM_CLASSES, (batch, SIZE, SIZE), device=device)

    def loss() -> Tensor:
        main, auxiliary = (
            nn.functional.cross_entropy(resize_maps(logits.float(), targets.shape[1:]), targets)
            for logits in model(images)
        )
        return main + 0.4 * auxiliary

    return model, loss


def transformers(batch: int, device: torch.device) -> ModelAndLoss:
    from transformers import BeitConfig, BeitForSemanticSegmentation

    # transformers numbers the feature maps from the embedding, and the last block cannot be one of them: the model gets
    # one more block, which is not used.
    config: Any = BeitConfig(
        image_size=SIZE,
        num_hidden_layers=12,
        out_indices=[4, 6, 8, 12],
        use_relative_position_bias=True,
        layer_scale_init_value=0.1,
        drop_path_rate=0.1,
        num_labels=NUM_CLASSES,
        pool_scales=[1, 2, 3, 6],
    )
    model = BeitForSemanticSegmentation(config)
    images = torch.randn(batch, 3, SIZE, SIZE, device=device)
    targets = torch.randint(NUM_CLASSES, (batch, SIZE, SIZE), device=device)

    def loss() -> Tensor:
        value: Tensor = model(pixel_values=images, labels=targets).loss
        return value

    return model, loss


def detect(batch: int, device: torch.device, **config: Any) -> ModelAndLoss:
    from pecobook.models.dense.detector import Detector

    description = {"name": "beit_base_patch16_224", "mean": MEAN, "std": STD}
    names = [str(number) for number in range(80)]
    body = pyramid(1344, **config)
    model = Detector(body, description, classes=names, category_ids=range(80), masks=True, sides=(800, 1333))
    height, width, num_objects = 800, 1066, 7  # COCO's usual shape and number of objects
    images = [torch.randint(256, (3, height, width), dtype=torch.uint8, device=device) for _ in range(batch)]
    corners = torch.rand(num_objects, 2, device=device) * 500
    boxes = torch.cat([corners, corners + 200], 1)
    masks = torch.zeros(num_objects, height, width, dtype=torch.uint8, device=device)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    target = {"boxes": boxes, "labels": torch.arange(num_objects, device=device) + 1, "masks": masks}

    def loss() -> Tensor:
        return torch.stack(list(model(images, [target] * batch).values())).sum()

    return model, loss


ROWS: dict[str, Callable[[int, torch.device], ModelAndLoss]] = {
    "segment 512: pecobook": segment,
    "segment 512: transformers": transformers,
    "segment 512: pecobook, checkpointing": lambda b, d: segment(b, d, checkpointing=True),
    "detect 800: global attention": detect,
    "detect 800: windows of 14": lambda b, d: detect(b, d, window=14),
    "detect 800: windows of 14, checkpointing": lambda b, d: detect(b, d, window=14, checkpointing=True),
}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    device = devices.device()
    torch.manual_seed(0)
    model, loss = ROWS[name](arguments.batch_size, device)
    model.to(device).train()
    seconds = median_step(model, loss, precision=arguments.precision, warmup=1, repeats=arguments.repeats)
    return {"seconds": seconds, "gib": devices.peak_memory(device) / 2**30}


def main() -> None:
    parser = rows_parser(__doc__, ROWS, batch_size=1, repeats=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.row, arguments)))
        return
    print(f"| {arguments.precision}, batch {arguments.batch_size} | s a step | images/s | GiB |\n|---|---|---|---|")
    words = "--batch-size", arguments.batch_size, "--repeats", arguments.repeats, "--precision", arguments.precision
    for name, row in measured_rows("benchmarks.dense_step", arguments.rows, *words):
        speed = arguments.batch_size / row["seconds"]
        print(f"| {name} | {row['seconds']:.3g} | {speed:.3g} | {row['gib']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
