"""A pre-training step of ViT-B/16 compared with transformers' BeitForMaskedImageModeling: equal model, batch, masks.

    python -m benchmarks.pretrain_step --batch-size 8          # on a CPU
    python -m benchmarks.pretrain_step --batch-size 128        # on a GPU

Each row is a process: forward, backward, the gradient clipped, AdamW. pecobook's is the stage that a run trains, with
its colour changes; the peers read float images. The last row is BEiT's whole training step: DALL-E's tokenizer encodes
112-pixel crops in every step, everything in fp32. pecobook's rows have their codes from a token bank. Images are random
and on the device; weights are random, which takes the same time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.runs import measured_rows, median_step, rows_parser
from pecobook.utils import devices

SHARED = {"init_values": 0.1, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
NUM_MASKED, VOCABULARY = 75, 8192


def ours(images: Tensor, mask: Tensor, codes: Tensor, residual: str = "fp32") -> tuple[nn.Module, Callable[[], Tensor]]:
    """Return the stage that `pecobook pretrain` trains; uint8 images, colours, loss and accuracy are part of it."""
    from pecobook.data.batch import Batch
    from pecobook.recipes import recipe
    from pecobook.settings.values import replace
    from pecobook.stages.pretrain import PretrainStage

    tokenizer = nn.Identity()
    tokenizer.num_codewords = VOCABULARY  # type: ignore[assignment]
    stage = PretrainStage(replace(recipe("pretrain", "paper"), {"data": "photos", "residual": residual}), tokenizer)
    pixels = (images.clamp(0, 1) * 255).to(torch.uint8)
    colour = torch.rand(len(images), 9, device=images.device)
    batch = Batch(image=pixels, colour=colour, mask=mask, codes=codes)

    def loss() -> Tensor:
        value: Tensor = stage(batch).loss
        return value

    return stage, loss


def transformers(images: Tensor, mask: Tensor, codes: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    from transformers import BeitConfig, BeitForMaskedImageModeling

    config = BeitConfig(
        vocab_size=VOCABULARY,
        use_mask_token=True,
        use_shared_relative_position_bias=True,
        layer_scale_init_value=0.1,
        drop_path_rate=0.1,
    )
    model = BeitForMaskedImageModeling(config)
    flat = mask.flatten(1)

    def loss() -> Tensor:
        value: Tensor = model(images, bool_masked_pos=flat, labels=codes[mask]).loss
        return value

    return model, loss


def beit(images: Tensor, mask: Tensor, codes: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    from pecobook.models.dalle import DalleTokenizer

    tokenizer = DalleTokenizer().eval().requires_grad_(False).to(images.device)
    small = nn.functional.interpolate(images.clamp(0, 1), (112, 112), mode="bicubic", antialias=True)
    model, loss_of_codes = transformers(images, mask, codes)

    def loss() -> Tensor:
        codes.copy_(tokenizer.encode(small))
        return loss_of_codes()

    return model, loss


COMPILED, TRITON, TUNED = ", compiled", ", --attention triton", ", --compile-mode max-autotune"
ROWS: dict[str, tuple[Callable[..., Any], str]] = {
    "pecobook, fp32": (ours, "fp32"),
    "transformers, fp32": (transformers, "fp32"),
    "pecobook, bf16": (ours, "bf16"),
    "transformers, bf16": (transformers, "bf16"),
    "pecobook, bf16, compiled": (ours, "bf16"),
    "pecobook, bf16, compiled, --attention triton": (ours, "bf16"),
    "pecobook, bf16, compiled, --attention triton, --residual bf16": (partial(ours, residual="bf16"), "bf16"),
    "pecobook, bf16, compiled, --compile-mode max-autotune": (ours, "bf16"),
    "transformers, bf16, compiled": (transformers, "bf16"),
    "BEiT's arrangement: DALL-E's tokenizer in each step, transformers, fp32": (beit, "fp32"),
}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    from pecobook.data.masking import blockwise_mask

    make_model, precision = ROWS[name]
    device = devices.device()
    torch.manual_seed(0)
    B = arguments.batch_size
    images = torch.randn(B, 3, 224, 224, device=device)
    generator = torch.Generator().manual_seed(0)
    masks = [blockwise_mask((14, 14), num_masked=NUM_MASKED, min_block=16, generator=generator) for _ in range(B)]
    codes = torch.randint(VOCABULARY, (B, 14, 14), device=device)
    model, loss = make_model(images, torch.stack(masks).to(device), codes)
    model.to(device).train()
    if COMPILED in name:
        model.compile(**({"mode": "max-autotune-no-cudagraphs"} if TUNED in name else {}))
    seconds = median_step(
        model,
        loss,
        precision=precision,
        warmup=3 if device.type == "cuda" else 1,
        repeats=arguments.repeats,
        attention="triton" if TRITON in name else "sdpa",
        clip=3.0,
    )
    return {"seconds": seconds, "mib": devices.peak_memory(device) / 2**20 if device.type == "cuda" else 0.0}


def main() -> None:
    arguments = rows_parser(__doc__, ROWS, batch_size=8, repeats=5).parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.row, arguments)))
        return
    print("| | images/s | s/step | MiB |\n|---|---|---|---|")
    words = "--batch-size", arguments.batch_size, "--repeats", arguments.repeats
    for name, row in measured_rows("benchmarks.pretrain_step", arguments.rows, *words):
        speed = arguments.batch_size / row["seconds"]
        print(f"| {name} | {speed:.3g} | {row['seconds']:.3g} | {round(row['mib']) or '-'} |", flush=True)


if __name__ == "__main__":
    main()
