"""Single operations of a step, one row each: what the parts of a roofline reach on this device.

    python -m benchmarks.micro           # one GPU: the sizes of ViT-B/16 at batch 128 and of the paper's tokenizer
    python -m benchmarks.micro --toy     # a CPU: small sizes

Products give TFLOP/s, operations on elements GB/s of what they must at least read and write, decoding images/s.
FP8 products are PyTorch's own `torch._scaled_mm`, e4m3 with one scale for each matrix, without and with the time of
scaling and rounding both matrices from bf16. A batch of uint8 images is uploaded as the training does it, between the
products of steps. GroupNorm and SiLU are measured as PyTorch runs them and as torch.compile joins them, in both
layouts; JPEGs are decoded by one core and, on a GPU, by torchvision's decoder there.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.io import decode_image, decode_jpeg, encode_jpeg

from benchmarks.runs import least_seconds
from pecobook.data.batch import Batch
from pecobook.data.stream import to_device
from pecobook.engine.feed import Feed
from pecobook.engine.skipped import Skipped
from pecobook.engine.speed import Speed
from pecobook.models.group_norm import GroupNorm
from pecobook.utils import devices


class Row(NamedTuple):
    """An operation, and the amount of work in a call."""

    name: str
    call: Callable[[], Any] | None
    """None leaves the row out on this device; `unit` names what it needs then."""
    amount: float
    unit: str


def sizes(tokens: int) -> Iterator[tuple[str, int, int, int]]:
    """The products of a block of ViT-B and of ViT-H for so many tokens, and a square one: name and sizes."""
    shrink = 1 if tokens >= 8192 else 4  # a toy
    for name, rows, inner, columns in (
        ("square product of 8,192", 8192, 8192, 8192),
        *(
            (f"{vit}, {name}", tokens, inner, columns)
            for vit, width in (("ViT-B", 768), ("ViT-H", 1280))
            for name, inner, columns in (
                ("query, key and value", width, 3 * width),
                ("first layer of the MLP", width, 4 * width),
                ("second layer of the MLP", 4 * width, width),
            )
        ),
        ("ViT-B, head of 8,192 codewords", tokens * 75 // 197, 768, 8192),
    ):
        yield name, rows // shrink**2, inner // shrink, columns // shrink


def products(device: torch.device, tokens: int) -> Iterator[Row]:
    """Each product in bf16, and beside it in FP8 where the device has it."""
    has_fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    for name, rows, inner, columns in sizes(tokens):
        a = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
        b = torch.randn(columns, inner, device=device, dtype=torch.bfloat16)
        work = 2e-12 * rows * inner * columns
        yield Row(f"{name}, bf16", partial(torch.matmul, a, b.t()), work, "TFLOP/s")
        if has_fp8:
            yield Row(f"{name}, FP8", partial(fp8_product, *to_fp8(a), *to_fp8(b)), work, "TFLOP/s")
            yield Row(f"{name}, FP8 from bf16", partial(fp8_product_of, a, b), work, "TFLOP/s")
    if not has_fp8:
        yield Row("products in FP8", None, 0, "a GPU with FP8 (compute capability 8.9)")


def to_fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return a matrix (N, M) in float8_e4m3fn, and the scale (), fp32, by which its values are multiplied."""
    scale = matrix.abs().amax().float().clamp_min(1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return (matrix.float() / scale).to(torch.float8_e4m3fn), scale


def fp8_product(a: Tensor, scale_a: Tensor, b: Tensor, scale_b: Tensor) -> Tensor:
    """Return a b^T, bf16 (rows, columns), of a (rows, inner) and b (columns, inner) in FP8, each with its scale."""
    return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=True)


_to_fp8_compiled = torch.compile(to_fp8, dynamic=True)


def fp8_product_of(a: Tensor, b: Tensor) -> Tensor:
    """Return `fp8_product` of two matrices in bf16, with their conversion."""
    return fp8_product(*_to_fp8_compiled(a), *_to_fp8_compiled(b))


def uploads(device: torch.device, side: int) -> Iterator[Row]:
    """Four steps of products, each with the upload of a batch of uint8 images, and without it."""
    is_gpu = device.type == "cuda"
    count, width = (128, 8192) if is_gpu else (4, 128)
    matrix = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    images = torch.zeros(count, 3, side, side, dtype=torch.uint8)
    batch: Batch = {"image": images.pin_memory() if is_gpu else images, "skipped": []}
    batches = itertools.repeat(batch)
    speed = Speed(0, 0.0, batch_size=count, flop=lambda: None, device=device, num_devices=1, precision="fp32")
    feed = Feed(batches, device, speed, Skipped(None))
    streams: list[tuple[str, Any]] = [
        ("steps without an upload", None),
        ("the same with uint8 batches uploaded between them", (to_device(batch, device) for batch in batches)),
    ]
    for name, source in [*streams, ("the same on a stream of their own", feed)] if is_gpu else streams:

        def steps(source: Any = source) -> None:
            for _ in range(4):
                uploaded = next(source)["image"] if source else None
                for _ in range(10):
                    torch.matmul(matrix, matrix)
                if uploaded is not None:
                    uploaded[0, 0, 0, 0].add_(1)  # the step reads its batch

        yield Row(name, steps, 4 * count, "images/s")
    if not is_gpu:
        yield Row("uploads on a stream of their own", None, 0, "a GPU")


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
    parts = products(device, tokens), uploads(device, side), elements(device, tokens, side), decoding(device, count)
    for rows in parts:
        for row in rows:
            if row.call is None:
                print(f"| {row.name} | left out: needs {row.unit} | |", flush=True)
                continue
            try:
                seconds = least_seconds(row.call, device, repeats=1 if toy else arguments.repeats)
            except RuntimeError as error:  # such as a torchvision without the GPU's decoder
                print(f"| {row.name} | failed: {str(error).splitlines()[0][:120]} | |", flush=True)
                continue
            print(f"| {row.name} | {1000 * seconds:.3g} | {row.amount / seconds:,.3g} {row.unit} |", flush=True)


if __name__ == "__main__":
    main()
