"""Settings of `pecobook export`, which writes weights for another library."""

from __future__ import annotations

from typing import Literal

from pecobook.settings.values import settings_class


@settings_class
class ExportConfig:
    """Write a run's weights for another library."""

    run: str = ""
    """A pecobook run or its export folder. On the command line it may come first, without the flag."""
    format: Literal["timm", "hf", "onnx"] = "timm"
    """Library to write for: timm, transformers (hf, as a BEiT) or ONNX, whose files take images in [0, 1]. Tokenizers
    and segmenters can only be exported to onnx."""
    out: str = ""
    """Folder to write; it must be new or empty."""
