"""Export to ONNX: a tokenizer becomes an encoder file and a decoder file, for any batch size and image size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pecobook.errors import PecobookError


class _EncodeModule(nn.Module):
    """Wraps `encode` of a tokenizer as a module."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        codes: Tensor = self.tokenizer.encode(images)
        return codes


class _DecodeModule(_EncodeModule):
    """Wraps `decode` of a tokenizer as a module."""

    def forward(self, codes: Tensor) -> Tensor:
        images: Tensor = self.tokenizer.decode(codes)
        return images


def export_onnx(tokenizer: Any, folder: str | Path) -> tuple[Path, Path]:
    """Write `encoder.onnx` and `decoder.onnx` of a tokenizer.

    Args:
        tokenizer: a tokenizer of `load_tokenizer`, on the CPU.
        folder: the folder to write; created if it is missing.

    Returns:
        paths of the two files. encoder.onnx maps `images`, float32 (B, C, H, W) in [0, 1] with sides that are multiples
        of the stride, to `codes`, int64 (B, h, w); decoder.onnx maps codes to images. Codes may differ from those of
        `tokenizer.encode` where two codewords are about equally near.

    Raises:
        PecobookError: the packages that write ONNX are not installed.
    """
    require_onnx()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    channels, stride = getattr(tokenizer, "in_channels", 3), tokenizer.stride
    # The tracer treats sizes 0 and 1 as constants, so the example contains no such size.
    images = torch.zeros(2, channels, 2 * stride, 3 * stride)
    codes = torch.zeros(2, 2, 3, dtype=torch.int64)
    batch, rows, columns = (torch.export.Dim(name, min=1, max=2**16) for name in ("batch", "rows", "columns"))
    paths = folder / "encoder.onnx", folder / "decoder.onnx"
    shapes = {0: batch, 2: stride * rows, 3: stride * columns}, {0: batch, 1: rows, 2: columns}
    write_onnx(_EncodeModule(tokenizer), images, shapes[0], paths[0], "images", "codes")
    write_onnx(_DecodeModule(tokenizer), codes, shapes[1], paths[1], "codes", "images")
    return paths


def require_onnx() -> None:
    """Raise PecobookError if the packages that write ONNX are not installed."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise PecobookError("ONNX files need two more packages: pip install 'pecobook[onnx]'.") from None


def write_onnx(
    module: nn.Module, example: Tensor, shape: dict[int, Any], path: Path, input_name: str, output_name: str
) -> None:
    """Write a module with one input and one output to an ONNX file.

    Args:
        module: the module.
        example: an example of the input.
        shape: dynamic dimensions of the example.
        path: the file to write.
        input_name: name of the input.
        output_name: name of the output.

    Raises:
        PecobookError: the packages that write ONNX are not installed.
    """
    require_onnx()
    program = torch.onnx.export(
        module.eval(),
        (example,),
        dynamo=True,
        dynamic_shapes=(shape,),
        input_names=[input_name],
        output_names=[output_name],
        verbose=False,
    )
    assert program is not None
    program.save(str(path))
