"""`pecobook export`: a run's weights for timm, transformers or ONNX runtimes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pecobook.errors import ConfigError, WeightsError
from pecobook.settings.export import ExportConfig

if TYPE_CHECKING:
    from torch import Tensor, nn


def export(config: ExportConfig) -> Path:
    """Write the files; returns their folder.

    Raises:
        PecobookError: no such run, or the format cannot hold it.
    """
    from pecobook.models.onnx import require_onnx
    from pecobook.utils.output_folder import OutputFolder

    if not config.run or not config.out:
        missing = "out" if config.run else "run"
        raise ConfigError(f"--{missing} is missing: pecobook export RUN --format timm --out DIR.")
    folder = OutputFolder(config.out)
    folder.check()
    write = _writer(config)
    if config.format == "onnx":
        require_onnx()
    with folder.begin():
        lines = write()
    out = Path(config.out)
    print(f"\nDone: {out}\n\n{lines.replace('{path}', str(out))}", file=sys.stderr)
    return out


def _writer(config: ExportConfig) -> Callable[[], str]:
    """What writes the files and returns Python lines that load them. Raises PecobookError."""
    from pecobook.models.export import read_export, read_settings
    from pecobook.models.weights import exported_network

    kind = read_settings(config.run).get("kind")
    if kind == "tokenizer":
        if config.format != "onnx":
            raise ConfigError(f"'{config.run}' is a tokenizer: --format onnx is what it can be exported to.")
        from pecobook.models.tokenizers import load_tokenizer

        return partial(_tokenizer_to_onnx, load_tokenizer(config.run), Path(config.out))
    if kind in ("segmenter", "detector"):
        if config.format != "onnx" or kind == "detector":
            raise ConfigError(f"'{config.run}' is a {kind}: a segmenter can be exported to onnx, a detector not.")
        return partial(_segmenter_to_onnx, config)
    settings, state = read_export(config.run)
    if config.format == "hf" and not settings["name"].startswith("beit_"):
        raise WeightsError(
            f"--format hf writes transformers' BEiT, and '{config.run}' is a {settings['name']}: use --format timm."
        )
    network = exported_network(settings, state, config.run)
    write = {"timm": _to_timm, "hf": _to_huggingface, "onnx": _to_onnx}[config.format]
    return partial(write, config, settings, state, network)


def _tokenizer_to_onnx(tokenizer: Any, out: Path) -> str:
    from pecobook.models.onnx import export_onnx

    export_onnx(tokenizer, out)
    return 'import onnxruntime\nsession = onnxruntime.InferenceSession("{path}/encoder.onnx")'


def _to_timm(config: ExportConfig, settings: dict[str, Any], state: dict[str, Tensor], network: nn.Module) -> str:
    """Timm's own folder format, which `timm.create_model("local-dir:...")` and the Hugging Face hub read."""
    from pecobook.models.export import write_export

    side, classes = settings["image_size"], settings.get("classes", [])
    layers: Any = network.pretrained_cfg  # which ones another number of classes or of channels replaces
    described = {
        "architecture": settings["name"],
        "num_classes": len(classes),
        "num_features": int(network.num_features),  # type: ignore[arg-type]
        "model_args": settings["args"],
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "mean": settings["mean"],
            "std": settings["std"],
            "interpolation": "bicubic",
            "crop_pct": settings.get("crop", 1.0),
            "num_classes": len(classes),
            **{name: layers[name] for name in ("classifier", "first_conv") if name in layers},
        },
        **({"label_names": classes} if classes else {}),
    }
    lines = 'import timm\nmodel = timm.create_model("local-dir:{path}", pretrained=True)'
    card = f"---\nlibrary_name: timm\n---\n# {settings['name']}, trained by pecobook\n\n```python\n{lines}\n```\n"
    write_export(Path(config.out), described, state, card)
    return lines


def _to_huggingface(config: ExportConfig, settings: dict[str, Any], state: dict[str, Tensor], network: Any) -> str:
    from pecobook.models.export import write_export
    from pecobook.models.huggingface import beit_config, beit_to_huggingface

    patch, heads = network.patch_embed.patch_size[0], network.blocks[0].attn.num_heads
    described = beit_config(state, image_size=settings["image_size"], patch_size=patch, num_heads=heads)
    own = beit_to_huggingface({name: value for name, value in state.items() if not name.startswith("head.")})
    architecture, weights = _architecture(config, settings, state, own)
    described |= {"architectures": [architecture], "use_mask_token": "beit.embeddings.mask_token" in weights}
    if "lm_head.weight" in weights:
        described["vocab_size"] = len(weights["lm_head.weight"])
    if classes := settings.get("classes"):
        described |= {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
    lines = f'from transformers import {architecture}\nmodel = {architecture}.from_pretrained("{{path}}")'
    out = Path(config.out)
    write_export(out, described, weights, f"---\nlibrary_name: transformers\n---\n\n```python\n{lines}\n```\n")
    (out / "preprocessor_config.json").write_text(json.dumps(_preprocessor(settings), indent=2) + "\n")
    return lines


def _architecture(
    config: ExportConfig, settings: dict[str, Any], state: dict[str, Tensor], own: dict[str, Tensor]
) -> tuple[str, dict[str, Tensor]]:
    """Which of transformers' models the weights are, and their names in it."""
    from pecobook.models.checkpoints import read_weights
    from pecobook.models.export import export_folder

    norm = {name: value for name, value in own.items() if name.startswith("layernorm.")}
    body = {f"beit.{name}": value for name, value in own.items() if name not in norm}
    pooled = {f"beit.pooler.{name}": value for name, value in norm.items()}
    if settings.get("classes"):
        head = {f"classifier.{part}": state[f"head.{part}"] for part in ("weight", "bias")}
        return "BeitForImageClassification", body | pooled | head
    file = export_folder(config.run) / "mim.safetensors"
    names_codes = settings.get("target") != "pixels"  # transformers has no model that restores pixels
    mim = read_weights(str(file)) if names_codes and file.is_file() else {}
    if mim.keys() == {"mask_token", "head.weight", "head.bias"}:
        masked = {
            "beit.embeddings.mask_token": mim["mask_token"][None, None],
            "lm_head.weight": mim["head.weight"],
            "lm_head.bias": mim["head.bias"],
        }
        return "BeitForMaskedImageModeling", body | norm | masked
    return "BeitModel", {name.removeprefix("beit."): value for name, value in (body | pooled).items()}


def _preprocessor(settings: dict[str, Any]) -> dict[str, Any]:
    side = {"height": settings["image_size"], "width": settings["image_size"]}
    return {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "size": side,
        "resample": 3,
        "do_center_crop": False,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": settings["mean"],
        "image_std": settings["std"],
    }


def _to_onnx(config: ExportConfig, settings: dict[str, Any], state: dict[str, Tensor], network: nn.Module) -> str:  # noqa: ARG001
    """model.onnx: normalised `images` (B, 3, S, S) to `output`, pooled features or the logits of the classes."""
    import torch

    from pecobook.models.onnx import write_onnx

    side = settings["image_size"]
    out = Path(config.out)
    _unfuse(network)
    batch = torch.export.Dim("batch", min=1, max=2**16)
    write_onnx(network, torch.zeros(2, 3, side, side), {0: batch}, out / "model.onnx", "images", "output")
    described = {
        name: settings[name] for name in ("name", "image_size", "mean", "std", "classes", "crop") if name in settings
    }
    (out / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    return 'import onnxruntime\nsession = onnxruntime.InferenceSession("{path}/model.onnx")'


def _segmenter_to_onnx(config: ExportConfig) -> str:
    """model.onnx: `images` (B, 3, S, S) in [0, 1] to `scores` of classes (B, C, S, S), S the side of its training."""
    import torch

    from pecobook.models.dense.segmenter import FixedSizeSegmenter, Segmenter
    from pecobook.models.onnx import write_onnx

    model = Segmenter.from_pretrained(config.run)
    side, out = model.image_size, Path(config.out)
    _unfuse(model)
    batch = torch.export.Dim("batch", min=1, max=2**16)
    fixed = FixedSizeSegmenter(model)
    write_onnx(fixed, torch.zeros(2, 3, side, side), {0: batch}, out / "model.onnx", "images", "scores")
    described = {"image_size": side, "classes": list(model.classes)}
    (out / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    return 'import onnxruntime\nsession = onnxruntime.InferenceSession("{path}/model.onnx")'


def _unfuse(network: nn.Module) -> None:
    """Attention in its parts: other runtimes fuse for themselves."""
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]
