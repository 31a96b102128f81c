"""A tokenizer for other runtimes: two ONNX files, images to codes and codes to images, of any batch and image size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecobook.errors import PecobookError


class _Encode(nn.Module):
    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        codes: Tensor = self.tokenizer.encode(images)
        return codes


class _Decode(_Encode):
    def forward(self, codes: Tensor) -> Tensor:
        images: Tensor = self.tokenizer.decode(codes)
        return images


def export_onnx(tokenizer: Any, folder: str | Path) -> tuple[Path, Path]:
    """Write `encoder.onnx` and `decoder.onnx`; returns their paths.

    Args:
        tokenizer: what `load_tokenizer` gives, on the CPU.
        folder: where to; made when it is missing.

    Returns:
        encoder.onnx takes `images`, float32 (B, C, H, W) in [0, 1] with sides that are multiples of the stride, and
        gives `codes`, int64 (B, h, w); decoder.onnx is the way back. Codes may differ where two codewords are about
        equally near.

    Raises:
        PecobookError: the packages that write ONNX are not installed.
    """
    require_onnx()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    channels, stride = getattr(tokenizer, "in_channels", 3), tokenizer.stride
    # Sizes of 0 and 1 are special to the tracer, so the example has none.
    images = torch.zeros(2, channels, 2 * stride, 3 * stride)
    codes = torch.zeros(2, 2, 3, dtype=torch.int64)
    batch, rows, columns = (torch.export.Dim(name, min=1, max=2**16) for name in ("batch", "rows", "columns"))
    paths = folder / "encoder.onnx", folder / "decoder.onnx"
    shapes = {0: batch, 2: stride * rows, 3: stride * columns}, {0: batch, 1: rows, 2: columns}
    write_onnx(_Encode(tokenizer), images, shapes[0], paths[0], "images", "codes")
    write_onnx(_Decode(tokenizer), codes, shapes[1], paths[1], "codes", "images")
    return paths


def require_onnx() -> None:
    """Raise PecobookError when the packages that write ONNX are not installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise PecobookError("ONNX files need two more packages: pip install 'pecobook[onnx]'.") from None


def write_onnx(module: nn.Module, example: Tensor, shape: dict[int, Any], path: Path, given: str, made: str) -> None:
    """Write one module of one input `given` and one output `made`; `shape` names the example's open dimensions."""
    require_onnx()
    program = torch.onnx.export(
        module.eval(),
        (example,),
        dynamo=True,
        dynamic_shapes=(shape,),
        input_names=[given],
        output_names=[made],
        verbose=False,
    )
    assert program is not None
    program.save(str(path))
