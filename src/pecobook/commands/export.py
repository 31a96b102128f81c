"""`pecobook export`: write a run's weights for timm, transformers or ONNX runtimes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from pecobook.errors import ConfigError, WeightsError
from pecobook.models import onnx
from pecobook.models.checkpoints import read_weights
from pecobook.models.dense.segmenter import Segmenter
from pecobook.models.export import export_folder, range_entry, read_settings, write_export
from pecobook.models.huggingface import beit_config, beit_processor, beit_to_huggingface
from pecobook.models.onnx import require_onnx
from pecobook.models.snippets import example_image, quoted, range_text, transformers_lines, with_image
from pecobook.models.tokenizers import load_tokenizer
from pecobook.models.weights import Backbone, Classifier
from pecobook.settings.export import ExportConfig
from pecobook.utils.files import write_json
from pecobook.utils.output_folder import OutputFolder
from pecobook.utils.printer import show


def export(config: ExportConfig) -> Path:
    """Write the exported files, print Python that applies them to an image, and return their folder.

    Raises:
        PecobookError: the run does not exist, or the format does not support its model.
    """
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
        lines = write_files()
    lines = with_image(lines, example_image(export_folder(config.run).parent))
    show(f"\nDone: {folder.path}\n\n{lines}")
    return folder.path


def _writer(config: ExportConfig) -> Callable[[], str]:
    """Return the function that writes the files and returns Python code that uses them. Raises PecobookError."""
    kind, out = read_settings(config.run).get("kind"), Path(config.out)
    if kind == "tokenizer":
        if config.format != "onnx":
            raise ConfigError(f"'{config.run}' is a tokenizer: --format onnx is the only format for tokenizers.")

        return partial(_to_onnx, onnx.export_onnx, load_tokenizer(config.run), out)
    if kind in ("segmenter", "detector"):
        if config.format != "onnx" or kind == "detector":
            raise ConfigError(
                f"'{config.run}' is a {kind}: segmenters can only be exported to onnx, and detectors not at all."
            )

        return partial(_to_onnx, onnx.export_segmenter, Segmenter.from_pretrained(config.run), out)
    if kind == "clip classifier":
        raise ConfigError(
            f"'{config.run}' is a clip classifier, for which no format has a network: its export folder is read by "
            "pecobook.ClipClassifier.from_pretrained, and sent by pecobook push."
        )
    network = (Classifier if kind == "classifier" else Backbone).from_pretrained(config.run)
    if config.format == "hf" and not network.name.startswith("beit_"):
        raise WeightsError(
            f"--format hf writes transformers' BEiT, but '{config.run}' is a {network.name}: use --format timm."
        )
    if config.format == "onnx":
        return partial(_to_onnx, onnx.export_backbone, network, out)
    write = {"timm": _to_timm, "hf": _to_huggingface}[config.format]
    return partial(write, config, network)


def _to_onnx(write: Callable[[Any, Path], object], model: Any, out: Path) -> str:
    """Write ONNX files and README.md; return the README's code with the paths of the files."""
    write(model, out)
    lines = (out / "README.md").read_text().split("```python\n")[1].split("\n```")[0]
    for file in out.glob("*.onnx"):
        lines = lines.replace(quoted(file.name), quoted(file))
    return lines


def _to_timm(config: ExportConfig, network: Backbone) -> str:
    """Write timm's folder format, which `timm.create_model("local-dir:...")` and the Hugging Face hub read."""
    size, classes = network.image_size or 224, list(network.classes)
    defaults: Any = network.network.pretrained_cfg
    # The layers that timm replaces when a user asks for another number of classes or channels.
    replaceable = {name: defaults[name] for name in ("classifier", "first_conv") if name in defaults}
    timm_config = {
        "architecture": network.name,
        "num_classes": len(classes),
        "num_features": int(network.network.num_features),  # type: ignore[arg-type]
        "model_args": network.args,
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "mean": network.mean,
            "std": network.std,
            "interpolation": "bicubic",
            "crop_pct": network.crop,
            "crop_mode": "center",
            "num_classes": len(classes),
            **replaceable,
        },
        **({"label_names": classes} if classes else {}),
        **range_entry(network),
    }
    lines = network.timm_folder_code(config.out)
    card = (
        f"---\nlibrary_name: timm\n---\n# {network.name}, trained by pecobook\n\n```python\n{lines}\n```\n\n"
        "`timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))` prepares images nearly alike: "
        "it resizes before it crops, so its crop lies up to half a pixel beside the one above.\n"
        f"{range_text(network.value_range)}\n"
    )
    write_export(Path(config.out), timm_config, network.network.state_dict(), card)
    return lines


def _to_huggingface(config: ExportConfig, network: Any) -> str:
    state = network.network.state_dict()
    patch, heads = network.network.patch_embed.patch_size[0], network.network.blocks[0].attn.num_heads
    size, crop = network.image_size or 224, network.crop
    hf_config = beit_config(state, image_size=size, patch_size=patch, num_heads=heads)
    body = beit_to_huggingface({name: value for name, value in state.items() if not name.startswith("head.")})
    architecture, weights = _architecture(config, network, state, body)
    hf_config |= {"architectures": [architecture], "use_mask_token": "beit.embeddings.mask_token" in weights}
    if "lm_head.weight" in weights:
        hf_config["vocab_size"] = len(weights["lm_head.weight"])
    if classes := list(network.classes):
        hf_config |= {"id2label": dict(enumerate(classes)), "label2id": {c: i for i, c in enumerate(classes)}}
    lines = transformers_lines(config.out, is_classifier=bool(classes), value_range=network.value_range)
    # With a shorter side, its central square would be empty, where `center_crop` takes one pixel.
    least = f"The image processor needs images of {math.ceil(1 / crop)} x {math.ceil(1 / crop)} pixels or more.\n"
    text = f"{least if crop < 1 else ''}{range_text(network.value_range)}"
    card = f"---\nlibrary_name: transformers\n---\n\n```python\n{lines}\n```\n\n{text}\n"
    out = Path(config.out)
    write_export(out, hf_config | range_entry(network), weights, card)
    processor = beit_processor(image_size=size, crop=crop, mean=network.mean, std=network.std)
    write_json(out / "preprocessor_config.json", processor)
    return lines


def _architecture(
    config: ExportConfig, network: Backbone, state: dict[str, Tensor], body: dict[str, Tensor]
) -> tuple[str, dict[str, Tensor]]:
    """Return the name of the transformers class for the weights, and the weights under that class's names.

    Args:
        config: settings, which name the run.
        network: the network of the run.
        state: its weights, under timm's names.
        body: the same weights without the head, under transformers' names.
    """
    norm = {name: value for name, value in body.items() if name.startswith("layernorm.")}
    encoder = {f"beit.{name}": value for name, value in body.items() if name not in norm}
    encoder |= {f"beit.pooler.{name}": value.clone() for name, value in norm.items()}
    if list(network.classes):
        head = {f"classifier.{part}": state[f"head.{part}"] for part in ("weight", "bias")}
        return "BeitForImageClassification", encoder | head
    file = export_folder(config.run) / "mim.safetensors"
    predicts_codes = network.target != "pixels"  # transformers has no BEiT that predicts pixels
    mim = read_weights(str(file)) if predicts_codes and file.is_file() else {}
    if mim.keys() == {"mask_token", "head.weight", "head.bias"}:
        masked = {
            "beit.embeddings.mask_token": mim["mask_token"][None, None],
            "lm_head.weight": mim["head.weight"],
            "lm_head.bias": mim["head.bias"],
        }
        # The pooler, which BeitForMaskedImageModeling leaves aside, gives AutoModel its trained norm.
        return "BeitForMaskedImageModeling", encoder | norm | masked
    return "BeitModel", {name.removeprefix("beit."): value for name, value in encoder.items()}
