"""Single operations of a step, one row each: what the parts of a roofline reach on this device.

    python -m benchmarks.micro           # one GPU: the sizes of ViT-B/16 at batch 128 and of the paper's tokenizer
    python -m benchmarks.micro --toy     # a CPU: small sizes

Products give TFLOP/s, operations on elements GB/s of what they must at least read and write, decoding images/s.
GroupNorm and SiLU are measured as PyTorch runs them and as torch.compile joins them, in both layouts; JPEGs are decoded
by one core and, on a GPU, by torchvision's decoder there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.io import decode_image, decode_jpeg, encode_jpeg

from benchmarks.runs import least_seconds
from pecobook.models.group_norm import GroupNorm
from pecobook.utils import devices


class Row(NamedTuple):
    """An operation, and the amount of work in a call."""

    name: str
    call: Callable[[], Any]
    amount: float
    unit: str


def products(device: torch.device, tokens: int) -> Iterator[Row]:
    """The products of a block of ViT-B for so many tokens, and a square one."""
    for name, rows, inner, columns in (
        ("square product of 8,192", 8192, 8192, 8192),
        ("query, key and value", tokens, 768, 2304),
        ("first layer of the MLP", tokens, 768, 3072),
        ("second layer of the MLP", tokens, 3072, 768),
        ("head of 8,192 codewords", tokens * 75 // 197, 768, 8192),
    ):
        if tokens < 8192:  # a toy
            rows, inner, columns = rows // 16, inner // 4, columns // 4
        a = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
        b = torch.randn(columns, inner, device=device, dtype=torch.bfloat16)
        yield Row(f"{name}, bf16", partial(torch.matmul, a, b.t()), 2e-12 * rows * inner * columns, "TFLOP/s")


def elements(device: torch.device, tokens: int, side: int) -> Iterator[Row]:
    """Operations on elements: those between the products of a block, and GroupNorm with SiLU, forward and backward."""
    x = torch.randn(tokens, 768, device=device)
    norm, scale = nn.LayerNorm(768, device=device), torch.ones(768, device=device)

    def residual() -> Tensor:
        return norm(x + scale * x)  # type: ignore[no-any-return]

    yield Row("LayerScale, residual and LayerNorm, fp32", residual, 8e-9 * x.numel(), "GB/s")
    yield Row("the same, compiled", torch.compile(residual), 8e-9 * x.numel(), "GB/s")
    for layout in (torch.contiguous_format, torch.channels_last):
        images = torch.randn(4, 128, side, side, device=device, dtype=torch.bfloat16).to(memory_format=layout)
        images.requires_grad_()
        module = nn.Sequential(GroupNorm(128, 4), nn.SiLU()).to(device, torch.bfloat16)
        name = "channels last" if layout == torch.channels_last else "contiguous"
        for how, function in (("", module), (", compiled", torch.compile(module))):

            def step(function: Any = function, images: Tensor = images) -> None:
                function(images).backward(images.detach())

            yield Row(f"GroupNorm and SiLU, {name}{how}", step, 8e-9 * images.numel(), "GB/s")


def decoding(device: torch.device, count: int) -> Iterator[Row]:
    """Decoding of JPEGs of 256 x 340 pixels."""
    noise = F.interpolate(torch.rand(1, 3, 32, 42), (256, 340), mode="bicubic")[0].clamp(0, 1)
    files = [encode_jpeg((255 * noise).byte())] * count
    yield Row("JPEGs decoded by one core", lambda: [decode_image(file) for file in files], count, "images/s")
    if device.type == "cuda":
        yield Row("JPEGs decoded by the GPU", lambda: decode_jpeg(files, device=device), count, "images/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--toy", action="store_true", help="small sizes, for a CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device, toy = devices.device(), arguments.toy
    tokens, side, count = (512, 32, 4) if toy else (25_216, 224, 256)
    print("| operation | ms | speed |\n|---|---|---|")
    for rows in (products(device, tokens), elements(device, tokens, side), decoding(device, count)):
        for row in rows:
            try:
                seconds = least_seconds(row.call, device, repeats=1 if toy else arguments.repeats)
            except RuntimeError as error:  # such as a torchvision without the GPU's decoder
                print(f"| {row.name} | failed: {str(error).splitlines()[0][:120]} | |", flush=True)
                continue
            print(f"| {row.name} | {1000 * seconds:.3g} | {row.amount / seconds:,.3g} {row.unit} |", flush=True)


if __name__ == "__main__":
    main()
