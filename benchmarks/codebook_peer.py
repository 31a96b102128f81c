"""A training step of the codebook compared with diffusers' VQModel and the lpips package: equal networks and precision.

    python -m benchmarks.codebook_peer --batch-size 2     # on a CPU, minutes
    python -m benchmarks.codebook_peer --batch-size 64    # on a GPU

Both are the paper's autoencoder at 224 pixels (16x, widths 64-128-256-512-512, 2 residual blocks a level in the encoder
and, as in diffusers, 3 in the decoder, 8,192 codewords of 256), with the five layers of VGG-16 that LPIPS compares.
Images and weights are random, which takes the same time. Each row is measured in a separate process, and has the number
of parameters and the counted operations; operations in compiled kernels are not counted. By default diffusers runs in
fp32, and pecobook in bf16 where the hardware has it: the defaults are the first and the fourth row.

Of the parts of a step, `perceptual` is the time that a step without the perceptual loss saves; `quantizer` (the forward
pass and the update of the codebook's averages) and `optimizer` are timed alone; the rest is the autoencoder.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.runs import least_seconds, measured_rows, median_step, rows_parser
from pecobook.utils import devices

WIDTHS, SIZE, K, D = (64, 128, 256, 512, 512), 224, 8192, 256


def codebook_stage(recipe_name: str, settings: dict[str, Any]) -> Any:
    """Build the codebook stage of a recipe with changed settings; the codebook counts as initialised already.

    The initialisation of the codebook is not part of a step.
    """
    from pecobook.recipes import recipe
    from pecobook.settings.values import replace
    from pecobook.stages.codebook import CodebookStage

    stage = CodebookStage(replace(recipe("codebook", recipe_name), settings))
    stage.tokenizer.quantizer._initialised = True
    return stage


def our_stage(*, perceptual: bool) -> nn.Module:
    vgg = {"network": "torchvision:vgg16", "layers": ("1", "2", "3", "4", "5"), "weights": "random"}
    network: dict[str, Any] = vgg if perceptual else {"network": "none"}
    settings = {f"perceptual.{name}": value for name, value in network.items()}
    stage: nn.Module = codebook_stage("paper", {**settings, "model.decoder_blocks": 3})
    return stage


def our_loss(stage: Any, images: Tensor) -> Callable[[], Tensor]:
    """Return a function that updates the codebook, as at the end of the step before, and computes the loss."""

    def loss() -> Tensor:
        stage.after_step(1, 2)
        value: Tensor = stage({"image": images}).loss
        return value

    return loss


class Peer(nn.Module):
    """The model and the loss of diffusers' users: the model's own codebook loss, squared error, and LPIPS."""

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
        """Return the loss, (), of images uint8 (B, 3, H, W)."""
        target = images.float() / 127.5 - 1
        output = self.model(target)
        loss = F.mse_loss(output.sample, target) + output.commit_loss
        if self.lpips is not None:
            loss = loss + self.lpips(target, output.sample).mean()
        return loss  # type: ignore[no-any-return]


def make_row(name: str, images: Tensor, *, perceptual: bool) -> tuple[nn.Module, Callable[[], Tensor], nn.Module]:
    """Return the model of a row, the function that computes the loss, and the model's quantizer."""
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # as in a run
    model: Any
    if name.startswith("pecobook"):
        model = our_stage(perceptual=perceptual).to(images.device).train()
        loss, quantizer = our_loss(model, images), model.tokenizer.quantizer
    else:
        model = Peer(perceptual=perceptual).to(images.device).train()
        if model.lpips is not None:
            model.lpips.eval()  # it has dropout, which is for the training of LPIPS itself
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
    device = devices.device()
    images = torch.randint(256, (arguments.batch_size, 3, SIZE, SIZE), dtype=torch.uint8, device=device)
    options = {"precision": ROWS[name], "warmup": 3 if device.type == "cuda" else 1, "repeats": arguments.repeats}
    model, loss, quantizer = make_row(name, images, perceptual=True)
    seconds = median_step(model, loss, **options)
    peak = devices.peak_memory(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    row = {
        "seconds": seconds,
        "gib": peak / 2**30,
        "parameters": sum(p.numel() for p in trained) + _num_codebook_values(model),
        "gflop": None if name.endswith(COMPILED) else _flops(loss) / arguments.batch_size / 1e9,
        "quantizer": _quantizer_seconds(name, quantizer, arguments.batch_size, device),
        "optimizer": _optimizer_seconds(trained),
    }
    del model, loss, quantizer, trained
    row["perceptual"] = seconds - median_step(*make_row(name, images, perceptual=False)[:2], **options)
    return row


def _num_codebook_values(model: Any) -> int:
    """Return the size of our codebook, which is learned by moving averages and so is no parameter."""
    tokenizer = getattr(model, "tokenizer", None)
    return 0 if tokenizer is None else int(tokenizer.codebook.numel())


def _flops(loss: Callable[[], Tensor]) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(loss())
    return float(counter.get_total_flops())


def _quantizer_seconds(name: str, quantizer: Any, batch_size: int, device: torch.device) -> float:
    z = torch.randn(batch_size, D, SIZE // 16, SIZE // 16, device=device)

    def quantize() -> None:
        quantizer(z)
        if name.startswith("pecobook"):
            quantizer.update()

    return least_seconds(quantize, device, repeats=5)


def _optimizer_seconds(parameters: list[nn.Parameter]) -> float:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return least_seconds(optimizer.step, parameters[0].device, repeats=5)


def main() -> None:
    arguments = rows_parser(__doc__, ROWS, batch_size=2, repeats=3).parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.row, arguments)))
        return
    columns = "images/s", "s/step", *PARTS, "peak GiB", "parameters", "GFLOP/image"
    print(f"| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    words = "--batch-size", arguments.batch_size, "--repeats", arguments.repeats
    for name, row in measured_rows("benchmarks.codebook_peer", arguments.rows, *words):
        print(_line(name, row, arguments.batch_size), flush=True)


def _line(name: str, row: dict[str, Any], batch_size: int) -> str:
    seconds = row["seconds"]
    parts = [row["perceptual"], row["quantizer"], row["optimizer"]]
    shares = " | ".join(f"{part / seconds:.0%}" for part in [seconds - sum(parts), *parts])
    gflop = "-" if row["gflop"] is None else f"{row['gflop']:.0f}"
    sizes = f"{row['gib']:.1f} | {row['parameters'] / 1e6:.1f}M | {gflop}"
    return f"| {name} | {batch_size / seconds:.3g} | {seconds:.3g} | {shares} | {sizes} |"


if __name__ == "__main__":
    main()
