"""A training step of the codebook beside diffusers' VQModel with the lpips package: equal networks and precision.

    python -m benchmarks.codebook_peer --batch-size 2     # on a CPU, minutes
    python -m benchmarks.codebook_peer --batch-size 64    # on a GPU

Both are the paper's autoencoder at 224 pixels (16x, widths 64-128-256-512-512, 2 residual blocks a level in the encoder
and, as diffusers has them, 3 in the decoder, 8,192 codewords of 256), with the five layers of VGG-16 that LPIPS
compares; parameters and counted operations stand beside each row. Images and weights are random, which costs the same.
diffusers runs fp32 unless asked, pecobook bf16 where the hardware has it, so what users get by default is the
fourth row beside the first. Each row is a process of its own. Compiled kernels hide their operations from the counter.

Of a step, perceptual is what is saved without a perceptual loss; quantizer (forward, and the codebook's averages) and
optimizer are timed alone; the rest is the autoencoder.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.runs import median_step, peak_bytes, rows_apart, rows_parser

WIDTHS, SIDE, K, D = (64, 128, 256, 512, 512), 224, 8192, 256


def stage_of(recipe_name: str, settings: dict[str, Any]) -> Any:
    """The codebook stage of a recipe with other settings; its codebook's start, which is no part of a step, is over."""
    from pecobook.recipes import recipe
    from pecobook.settings.values import replace
    from pecobook.stages.codebook import CodebookStage

    stage = CodebookStage(replace(recipe("codebook", recipe_name), settings))
    stage.tokenizer.quantizer._initialised = True
    return stage


def ours(*, perceptual: bool) -> nn.Module:
    seen = {"network": "torchvision:vgg16", "layers": ("1", "2", "3", "4", "5"), "weights": "random"}
    chosen = {f"perceptual.{name}": value for name, value in (seen if perceptual else {"network": "none"}).items()}
    stage: nn.Module = stage_of("paper", {**chosen, "model.decoder_blocks": 3})
    return stage


def loss_of_ours(stage: Any, images: Tensor) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        stage.after_step(1, 2)  # the step before this one moves the codebook
        value: Tensor = stage({"image": images}).loss
        return value

    return loss


class Peer(nn.Module):
    """As diffusers' users train it: the model's own codebook loss, squared error, and LPIPS."""

    def __init__(self, *, perceptual: bool) -> None:
        import lpips
        from diffusers import VQModel

        super().__init__()
        levels = len(WIDTHS)
        self.model = VQModel(
            block_out_channels=WIDTHS,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=2,
            latent_channels=D,
            num_vq_embeddings=K,
        )
        self.lpips = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False) if perceptual else None

    def forward(self, images: Tensor) -> Tensor:
        """The loss of uint8 (B, 3, H, W), ()."""
        target = images.float() / 127.5 - 1
        restored = self.model(target)
        loss = F.mse_loss(restored.sample, target) + restored.commit_loss
        return loss if self.lpips is None else loss + self.lpips(target, restored.sample).mean()


def step_of(name: str, images: Tensor, *, perceptual: bool) -> tuple[nn.Module, Callable[[], Tensor], nn.Module]:
    """The model, its loss, and the quantizer in it."""
    torch.manual_seed(0)
    model: Any
    if name.startswith("pecobook"):
        model = ours(perceptual=perceptual).to(images.device).train()
        loss, quantizer = loss_of_ours(model, images), model.tokenizer.quantizer
    else:
        model = Peer(perceptual=perceptual).to(images.device).train()
        if model.lpips is not None:
            model.lpips.eval()  # it has dropout, for training LPIPS itself
        loss, quantizer = partial(model, images), model.model.quantize
    if name.endswith(COMPILED):
        model.compile()
    return model, loss, quantizer


PARTS = "autoencoder", "perceptual", "quantizer", "optimizer"
ROWS = {
    "diffusers and lpips, fp32": "fp32",
    "pecobook, fp32": "fp32",
    "diffusers and lpips, bf16": "bf16",
    "pecobook, bf16": "bf16",
    "diffusers and lpips, bf16, compiled": "bf16",
    "pecobook, bf16, compiled": "bf16",
}
COMPILED = ", compiled"


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = torch.randint(256, (arguments.batch_size, 3, SIDE, SIDE), dtype=torch.uint8, device=device)
    count = {"precision": ROWS[name], "warmup": 3 if device.type == "cuda" else 1, "repeats": arguments.repeats}
    model, loss, quantizer = step_of(name, images, perceptual=True)
    whole = median_step(model, loss, **count)
    peak = peak_bytes(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    row = {
        "seconds": whole,
        "gib": peak / 2**30,
        "parameters": sum(p.numel() for p in trained) + _buffers(model),
        "gflop": None if name.endswith(COMPILED) else _flops(loss) / arguments.batch_size / 1e9,
        "quantizer": _quantizer_seconds(name, quantizer, arguments.batch_size, device),
        "optimizer": _optimizer_seconds(trained),
    }
    del model, loss, quantizer, trained
    row["perceptual"] = whole - median_step(*step_of(name, images, perceptual=False)[:2], **count)
    return row


def _buffers(model: Any) -> int:
    """Numbers of a codebook that is learned by averages and not by the optimizer."""
    tokenizer = getattr(model, "tokenizer", None)
    return 0 if tokenizer is None else int(tokenizer.codebook.numel())


def _flops(loss: Callable[[], Tensor]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(loss())
    return float(counter.get_total_flops())


def _quantizer_seconds(name: str, quantizer: Any, batch_size: int, device: torch.device) -> float:
    z = torch.randn(batch_size, D, SIDE // 16, SIDE // 16, device=device)

    def call() -> None:
        quantizer(z)
        if name.startswith("pecobook"):
            quantizer.update()

    return _seconds(call, device)


def _optimizer_seconds(parameters: list[nn.Parameter]) -> float:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return _seconds(optimizer.step, parameters[0].device)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call, the least of five."""
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def main() -> None:
    arguments = rows_parser(__doc__, ROWS, batch_size=2, repeats=3).parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.row, arguments)))
        return
    columns = "images/s", "s/step", *PARTS, "peak GiB", "parameters", "GFLOP/image"
    print(f"| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    words = "--batch-size", arguments.batch_size, "--repeats", arguments.repeats
    for name, row in rows_apart("benchmarks.codebook_peer", arguments.rows, *words):
        print(_line(name, row, arguments.batch_size), flush=True)


def _line(name: str, row: dict[str, Any], batch_size: int) -> str:
    seconds = row["seconds"]
    parts = [row["perceptual"], row["quantizer"], row["optimizer"]]
    shares = " | ".join(f"{part / seconds:.0%}" for part in [seconds - sum(parts), *parts])
    counted = "-" if row["gflop"] is None else f"{row['gflop']:.0f}"
    sizes = f"{row['gib']:.1f} | {row['parameters'] / 1e6:.1f}M | {counted}"
    return f"| {name} | {batch_size / seconds:.3g} | {seconds:.3g} | {shares} | {sizes} |"


if __name__ == "__main__":
    main()
