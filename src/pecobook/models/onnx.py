"""Export to ONNX: files that read images in [0, 1], with metadata, and a README whose Python needs no PyTorch.

Everything except reading, cropping and resizing an image is inside the graph: nobody needs a mean or a deviation.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pecobook.models import onnx_readme
from pecobook.models.dense.segmenter import FixedSizeSegmenter, Segmenter
from pecobook.models.export import range_entry
from pecobook.models.weights import Backbone, Classifier
from pecobook.settings.images import AUTO
from pecobook.settings.segment import SegmentTestConfig
from pecobook.utils.extras import require
from pecobook.utils.files import write_atomically, write_json

_VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


class _Method(nn.Module):
    """Wraps `encode` or `decode` of a tokenizer as a module."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        super().__init__()
        self.tokenizer, self.name = tokenizer, name

    def forward(self, values: Tensor) -> Tensor:
        return getattr(self.tokenizer, self.name)(values)  # type: ignore[no-any-return]


def export_onnx(tokenizer: Any, folder: str | Path) -> tuple[Path, Path]:
    """Write `encoder.onnx`, `decoder.onnx` and README.md of a tokenizer.

    Args:
        tokenizer: a tokenizer of `load_tokenizer`, on the CPU.
        folder: the folder to write; created if it does not exist.

    Returns:
        paths of the two files. encoder.onnx maps `images`, float32 (B, C, H, W) in [0, 1] with sides that are multiples
        of the stride, to `codes`, int64 (B, h, w); decoder.onnx maps codes to images, or to the `features` that the
        decoder predicts. Codes may differ from those of `tokenizer.encode` if two codewords are about equally near.

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
    described = {
        "task": "tokens",
        "images": f"float32 (batch, {channels}, height, width) in [0, 1], sides are multiples of {stride}",
        "codes": f"int64 (batch, height / {stride}, width / {stride}), numbers of codewords",
        "image_size": tokenizer.image_size,
        "stride": stride,
        "num_codewords": tokenizer.num_codewords,
        **range_entry(tokenizer),
    }
    write_onnx(_Method(tokenizer, "encode"), images, shapes[0], paths[0], "images", "codes", described)
    predicts = getattr(tokenizer, "predicts", "")
    decoded = "features" if predicts else "images"
    if predicts:
        described["features"] = f"float32 (batch, channels, height, width) on the grid of the codes: {predicts}"
    decode = _Method(tokenizer, "features_of" if predicts else "decode")
    write_onnx(decode, codes, shapes[1], paths[1], "codes", decoded, described)
    value_range = getattr(tokenizer, "value_range", AUTO)
    lines = onnx_readme.tokenizer_lines(tokenizer.image_size, channels, value_range, draws=not predicts)
    _write_readme(folder, described, lines)
    return paths


def export_backbone(network: Backbone, folder: Path) -> None:
    """Write model.onnx, config.json and README.md of a backbone or classifier.

    model.onnx maps `images`, float32 (B, 3, S, S) in [0, 1], to `output`: pooled features (B, F) or class logits.
    Raises PecobookError if the packages that write ONNX are not installed.
    """
    size = network.image_size or 224
    described: dict[str, Any] = {"name": network.name, "image_size": size, "crop": network.crop, **range_entry(network)}
    output = "float32 (batch, features), the network's pooled features"
    lines = onnx_readme.backbone_lines(size, network.value_range)
    if isinstance(network, Classifier):
        described["classes"] = list(network.classes)
        output = f"float32 (batch, {len(network.classes)}), the logits of the classes"
        lines = onnx_readme.classifier_lines(size, network.crop, network.value_range)
    task = "classification" if isinstance(network, Classifier) else "features"
    _export_fixed_size(network, size, described, {"task": task, "output": output}, lines, folder)


def export_segmenter(model: Segmenter, folder: Path) -> None:
    """Write model.onnx, config.json and README.md of a segmenter; modifies `model`.

    model.onnx maps `images`, float32 (B, 3, S, S) in [0, 1], to class `scores` (B, C, S, S). Raises PecobookError if
    the packages that write ONNX are not installed.
    """
    size = model.image_size
    described: dict[str, Any] = {"image_size": size, "classes": list(model.classes), **range_entry(model)}
    scores = f"float32 (batch, {len(model.classes)}, {size}, {size}), the scores of the classes of every pixel"
    texts = {"task": "segmentation", "scores": scores}
    step = max(round(size * SegmentTestConfig().stride), 1)
    lines = onnx_readme.segmenter_lines(size, step, model.value_range)
    _export_fixed_size(FixedSizeSegmenter(model), size, described, texts, lines, folder)


def _export_fixed_size(
    network: nn.Module, size: int, described: dict[str, Any], texts: dict[str, str], lines: str, folder: Path
) -> None:
    """Write model.onnx, config.json with `described`, and README.md.

    Args:
        network: a module with one input and one output, images float (B, 3, S, S) in [0, 1].
        size: S.
        described: content of config.json, which is also written as metadata.
        texts: more metadata; the last key is the name of the output.
        lines: Python code for the README.
        folder: the folder to write.
    """
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]  # ONNX runtimes fuse attention themselves
    task, output = texts
    metadata = {
        task: texts[task],
        "images": f"float32 (batch, 3, {size}, {size}), RGB in [0, 1]; the graph normalises them",
        output: texts[output],
        **described,
    }
    batch = torch.export.Dim("batch", min=1, max=2**16)
    example = torch.zeros(2, 3, size, size)
    write_onnx(network, example, {0: batch}, folder / "model.onnx", "images", output, metadata)
    write_json(folder / "config.json", described)
    _write_readme(folder, metadata, lines)


def _write_readme(folder: Path, metadata: dict[str, Any], lines: str) -> None:
    write_atomically(folder / "README.md", onnx_readme.readme(metadata, lines).encode())


def require_onnx() -> None:
    """Raise PecobookError if the packages that write ONNX are not installed."""
    require("onnx", "--format onnx")


def write_onnx(
    module: nn.Module,
    example: Tensor,
    shape: dict[int, Any],
    path: Path,
    input_name: str,
    output_name: str,
    metadata: dict[str, Any],
) -> None:
    """Write a module with one input and one output to an ONNX file.

    Args:
        module: the module.
        example: an example of the input.
        shape: dynamic dimensions of the example.
        path: the file to write.
        input_name: name of the input.
        output_name: name of the output.
        metadata: properties stored in the file; those that are not strings are written as JSON.

    Raises:
        PecobookError: the packages that write ONNX are not installed.
    """
    require_onnx()
    model: tuple[Any, ...] = module.eval(), (example,)
    more: dict[str, Any] = {"dynamic_shapes": (shape,)}
    with _helped_exporter():
        if _VERSION < (2, 11):  # torch.onnx.export would trace bytecode first, and crash on a codebook's search
            from torch._dynamo.exc import UserError  # a second of imports

            with suppress(UserError):  # where a network asks for the size of the batch; it then tries its other ways
                model, more = (torch.export.export(*model, **more, strict=False),), {}
        more |= {"input_names": [input_name], "output_names": [output_name], "dynamo": True, "verbose": False}
        program = torch.onnx.export(*model, **more)
    assert program is not None
    for name, value in metadata.items():
        program.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    program.save(str(path))


@contextmanager
def _helped_exporter() -> Iterator[None]:
    """In this context PyTorch 2.6's exporter translates BatchNorm, and does not print guards that it leaves out."""
    if _VERSION > (2, 6):
        yield
        return
    guards = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = guards.level
    guards.setLevel(logging.ERROR)
    try:
        with mock.patch.object(F, "batch_norm", _batch_norm):
            yield
    finally:
        guards.setLevel(level)


def _batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, _training: bool, _momentum: float, eps: float
) -> Tensor:
    """Compute BatchNorm in evaluation mode, x (B, C, ...), with operators that every exporter translates."""
    scale = weight * torch.rsqrt(var + eps)
    shape = (-1, *(1 for _ in x.shape[2:]))
    return x * scale.view(shape) + (bias - mean * scale).view(shape)
