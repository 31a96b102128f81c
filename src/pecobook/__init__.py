"""pecobook: perceptual codebooks for BERT pre-training of vision transformers (PeCo, arXiv 2111.12710).

The public names are those in `__all__`; each is imported on first use, so that `pecobook --help` is quick.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pecobook.api import codebook, contrast, detect, export, finetune, predict, pretrain, segment, tokenize
    from pecobook.commands.analyze import analyze
    from pecobook.commands.bench import bench
    from pecobook.commands.check import check
    from pecobook.commands.compare import compare
    from pecobook.commands.demo import demo
    from pecobook.commands.embed import embed
    from pecobook.commands.evaluate import evaluate
    from pecobook.commands.explore import explore
    from pecobook.commands.probe import probe
    from pecobook.commands.push import push
    from pecobook.commands.reproduce import reproduce
    from pecobook.data.clips import read_clip
    from pecobook.data.images import read_image
    from pecobook.data.masking import blockwise_mask
    from pecobook.errors import PecobookError
    from pecobook.models.dense.detector import Detector
    from pecobook.models.dense.segmenter import Segmenter
    from pecobook.models.masked_vit import MaskedImageModel
    from pecobook.models.nearest import nearest_codeword
    from pecobook.models.perceptual import PerceptualDistance
    from pecobook.models.quantizer import VectorQuantizer
    from pecobook.models.tokenizer import PerceptualTokenizer
    from pecobook.models.tokenizers import load_tokenizer
    from pecobook.models.video import ClipClassifier
    from pecobook.models.weights import Backbone, Classifier

if sys.platform == "darwin":  # before torch is imported: operations that Apple's GPUs lack run on the CPU
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

__all__ = ["Backbone", "Classifier", "ClipClassifier", "Detector", "MaskedImageModel", "PecobookError"]
__all__ += ["PerceptualDistance", "PerceptualTokenizer", "Segmenter", "VectorQuantizer", "analyze", "bench"]
__all__ += ["blockwise_mask", "check", "codebook", "compare", "contrast", "demo", "detect", "embed", "evaluate"]
__all__ += ["explore", "export", "finetune", "load_tokenizer", "nearest_codeword", "predict", "pretrain", "probe"]
__all__ += ["push", "read_clip", "read_image", "reproduce", "segment", "tokenize"]

_API = ("codebook", "contrast", "detect", "export", "finetune", "predict", "pretrain", "segment", "tokenize")
# The modules of the names that are not commands; a command is the function of the same name in `pecobook.commands`.
_HOMES = {
    **dict.fromkeys(_API, "api"),
    "Backbone": "models.weights",
    "Classifier": "models.weights",
    "ClipClassifier": "models.video",
    "Detector": "models.dense.detector",
    "MaskedImageModel": "models.masked_vit",
    "PecobookError": "errors",
    "PerceptualDistance": "models.perceptual",
    "PerceptualTokenizer": "models.tokenizer",
    "Segmenter": "models.dense.segmenter",
    "VectorQuantizer": "models.quantizer",
    "blockwise_mask": "data.masking",
    "load_tokenizer": "models.tokenizers",
    "nearest_codeword": "models.nearest",
    "read_clip": "data.clips",
    "read_image": "data.images",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("pecobook")
    if name not in __all__:
        raise AttributeError(f"module 'pecobook' has no attribute '{name}'")
    return getattr(import_module(_home(name)), name)


def _home(name: str) -> str:
    """Return the module that defines a public name."""
    return f"pecobook.{_HOMES.get(name, f'commands.{name}')}"


def __dir__() -> list[str]:
    return __all__
