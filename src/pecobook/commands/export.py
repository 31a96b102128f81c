"""`pecobook export`: write a run's weights for timm, transformers or ONNX runtimes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pecobook.errors import ConfigError, WeightsError
from pecobook.settings.export import ExportConfig
from pecobook.utils.files import write_json

if TYPE_CHECKING:
    from torch import Tensor, nn


def export(config: ExportConfig) -> Path:
    """Write the exported files and return their folder.

    Raises:
        PecobookError: the run does not exist, or the format cannot hold its model.
    """
    from pecobook.models.onnx import require_onnx
    from pecobook.utils.output_folder import OutputFolder

    missing = [f"--{name}" for name in ("run", "out") if not getattr(config, name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigError(f"{', '.join(missing)} {verb} missing: pecobook export RUN --format timm --out DIR.")
    folder = OutputFolder(config.out)
    folder.check()
    write_files = _writer(config)
    if config.format == "onnx":
        require_onnx()
    with folder.begin():
        usage = write_files()
    print(f"\nDone: {folder.path}\n\n{usage.replace('{path}', str(folder.path))}", file=sys.stderr)
    return folder.path


def _writer(config: ExportConfig) -> Callable[[], str]:
    """Return the function that writes the files and returns Python lines that load them. Raises PecobookError."""
    from pecobook.models.export import read_export, read_settings
    from pecobook.models.weights import exported_network

    kind = read_settings(config.run).get("kind")
    if kind == "tokenizer":
        if config.format != "onnx":
            raise ConfigError(f"'{config.run}' is a tokenizer: --format onnx is the only format for tokenizers.")
        from pecobook.models.tokenizers import load_tokenizer

        return partial(_tokenizer_to_onnx, load_tokenizer(config.run), Path(config.out))
    if kind in ("segmenter", "detector"):
        if config.format != "onnx" or kind == "detector":
            raise ConfigError(
                f"'{config.run}' is a {kind}: segmenters can only be exported to onnx, and detectors not at all."
            )
        from pecobook.models.dense.segmenter import FixedSizeSegmenter, Segmenter

        model = Segmenter.from_pretrained(config.run)
        described = {"image_size": model.image_size, "classes": list(model.classes)}
        return partial(_to_onnx, FixedSizeSegmenter(model), described, "scores", Path(config.out))
    settings, state = read_export(config.run)
    if config.format == "hf" and not settings["name"].startswith("beit_"):
        raise WeightsError(
            f"--format hf writes transformers' BEiT, but '{config.run}' is a {settings['name']}: use --format timm."
        )
    network = exported_network(settings, state, config.run)
    if config.format == "onnx":
        names = ("name", "image_size", "mean", "std", "classes", "crop")
        described = {name: settings[name] for name in names if name in settings}
        return partial(_to_onnx, network, described, "output", Path(config.out))
    write = {"timm": _to_timm, "hf": _to_huggingface}[config.format]
    return partial(write, config, settings, state, network)


def _tokenizer_to_onnx(tokenizer: Any, out: Path) -> str:
    from pecobook.models.onnx import export_onnx

    export_onnx(tokenizer, out)
    return 'import onnxruntime\nsession = onnxruntime.InferenceSession("{path}/encoder.onnx")'


def _to_timm(config: ExportConfig, settings: dict[str, Any], state: dict[str, Tensor], network: nn.Module) -> str:
    """Write timm's folder format, which `timm.create_model("local-dir:...")` and the Hugging Face hub read."""
    from pecobook.models.export import write_export

    size, classes = settings["image_size"], settings.get("classes", [])
    defaults: Any = network.pretrained_cfg
    # The layers that timm replaces when a user asks for another number of classes or channels.
    replaceable = {name: defaults[name] for name in ("classifier", "first_conv") if name in defaults}
    timm_config = {
        "architecture": settings["name"],
        "num_classes": len(classes),
        "num_features": int(network.num_features),  # type: ignore[arg-type]
        "model_args": settings["args"],
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "mean": settings["mean"],
            "std": settings["std"],
            "interpolation": "bicubic",
            "crop_pct": settings.get("crop", 1.0),
            "num_classes": len(classes),
            **replaceable,
        },
        **({"label_names": classes} if classes else {}),
    }
    usage = 'import timm\nmodel = timm.create_model("local-dir:{path}", pretrained=True)'
    card = f"---\nlibrary_name: timm\n---\n# {settings['name']}, trained by pecobook\n\n```python\n{usage}\n```\n"
    write_export(Path(config.out), timm_config, state, card)
    return usage


def _to_huggingface(config: ExportConfig, settings: dict[str, Any], state: dict[str, Tensor], network: Any) -> str:
    from pecobook.models.export import write_export
    from pecobook.models.huggingface import beit_config, beit_to_huggingface

    patch, heads = network.patch_embed.patch_size[0], network.blocks[0].attn.num_heads
    hf_config = beit_config(state, image_size=settings["image_size"], patch_size=patch, num_heads=heads)
    body = beit_to_huggingface({name: value for name, value in state.items() if not name.startswith("head.")})
    architecture, weights = _architecture(config, settings, state, body)
    hf_config |= {"architectures": [architecture], "use_mask_token": "beit.embeddings.mask_token" in weights}
    if "lm_head.weight" in weights:
        hf_config["vocab_size"] = len(weights["lm_head.weight"])
    if classes := settings.get("classes"):
        hf_config |= {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
    usage = f'from transformers import {architecture}\nmodel = {architecture}.from_pretrained("{{path}}")'
    out = Path(config.out)
    write_export(out, hf_config, weights, f"---\nlibrary_name: transformers\n---\n\n```python\n{usage}\n```\n")
    write_json(out / "preprocessor_config.json", _preprocessor(settings))
    return usage


def _architecture(
    config: ExportConfig, settings: dict[str, Any], state: dict[str, Tensor], body: dict[str, Tensor]
) -> tuple[str, dict[str, Tensor]]:
    """Return the name of transformers' class for the weights, and the weights under the names of this class.

    Args:
        config: names the run.
        settings: settings of the run's export.
        state: weights of the run's export, under timm's names.
        body: the same weights without the head, under transformers' names.
    """
    from pecobook.models.checkpoints import read_weights
    from pecobook.models.export import export_folder

    norm = {name: value for name, value in body.items() if name.startswith("layernorm.")}
    encoder = {f"beit.{name}": value for name, value in body.items() if name not in norm}
    pooled = {f"beit.pooler.{name}": value for name, value in norm.items()}
    if settings.get("classes"):
        head = {f"classifier.{part}": state[f"head.{part}"] for part in ("weight", "bias")}
        return "BeitForImageClassification", encoder | pooled | head
    file = export_folder(config.run) / "mim.safetensors"
    predicts_codes = settings.get("target") != "pixels"  # transformers has no BEiT that predicts pixels
    mim = read_weights(str(file)) if predicts_codes and file.is_file() else {}
    if mim.keys() == {"mask_token", "head.weight", "head.bias"}:
        masked = {
            "beit.embeddings.mask_token": mim["mask_token"][None, None],
            "lm_head.weight": mim["head.weight"],
            "lm_head.bias": mim["head.bias"],
        }
        return "BeitForMaskedImageModeling", encoder | norm | masked
    return "BeitModel", {name.removeprefix("beit."): value for name, value in (encoder | pooled).items()}


def _preprocessor(settings: dict[str, Any]) -> dict[str, Any]:
    size = {"height": settings["image_size"], "width": settings["image_size"]}
    return {
        "image_processor_type": "BeitImageProcessor",
        "do_resize": True,
        "size": size,
        "resample": 3,
        "do_center_crop": False,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": settings["mean"],
        "image_std": settings["std"],
    }


def _to_onnx(network: nn.Module, described: dict[str, Any], output: str, out: Path) -> str:
    """Write model.onnx and config.json.

    A backbone or classifier maps normalised `images` (B, 3, S, S) to `output`, pooled features or the logits of the
    classes. A segmenter maps `images` (B, 3, S, S) in [0, 1] to `scores` of the classes (B, C, S, S).

    Args:
        network: a module that takes images of the side S at which it was trained.
        described: content of config.json, with the side `image_size`.
        output: name of the network's output.
        out: folder to write.
    """
    import torch

    from pecobook.models.onnx import write_onnx

    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]  # ONNX runtimes fuse attention themselves
    size = described["image_size"]
    batch = torch.export.Dim("batch", min=1, max=2**16)
    write_onnx(network, torch.zeros(2, 3, size, size), {0: batch}, out / "model.onnx", "images", output)
    write_json(out / "config.json", described)
    return 'import onnxruntime\nsession = onnxruntime.InferenceSession("{path}/model.onnx")'
