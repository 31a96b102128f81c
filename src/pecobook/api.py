"""The commands as functions: `pecobook.codebook(recipe="cifar10", data=..., out=...)`.

Keywords have the names of the flags: `perceptual={"network": "timm:resnet50"}` or `**{"perceptual.network":
"timm:resnet50"}`. A training command also accepts objects instead of names: a data set or a list of files as `data`, an
nn.Module as `tokenizer`, `backbone` or perceptual network, a `transform`, a hook `on_step`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Unpack

from pecobook import recipes
from pecobook.errors import ConfigError
from pecobook.keywords import (
    CodebookKeywords,
    ContrastKeywords,
    DetectKeywords,
    FinetuneKeywords,
    PretrainKeywords,
    SegmentKeywords,
)
from pecobook.recipes import DEFAULT_RECIPE
from pecobook.settings.training import TrainConfig
from pecobook.settings.values import replace
from pecobook.utils.given import giving, name_of


def run(command: str, config: TrainConfig, recipe: str = "") -> Path:
    """Train the stage of a command with complete settings; return the run folder.

    `recipe` is the name of the recipe that the settings come from; config.diff compares them with it.
    """
    from pecobook.stages.training import train

    module, name = _STAGES[command]
    return train(getattr(import_module(f"pecobook.stages.{module}"), name), config, recipe)


_STAGES = {
    "contrast": ("moco", "MocoStage"),
    "codebook": ("codebook", "CodebookStage"),
    "pretrain": ("pretrain", "PretrainStage"),
    "finetune": ("classify", "ClassifyStage"),
    "segment": ("segment", "SegmentStage"),
    "detect": ("detect", "DetectStage"),
}
"""Module and class of each stage. Only the needed one is imported: importing all takes longer than starting a run."""


def contrast(recipe: str = DEFAULT_RECIPE, **settings: Unpack[ContrastKeywords]) -> Path:
    """Train a feature network with MoCo v3; return the run folder. Raises PecobookError."""
    return _run("contrast", recipe, settings)


def codebook(recipe: str = DEFAULT_RECIPE, **settings: Unpack[CodebookKeywords]) -> Path:
    """Train a perceptual codebook; return the run folder. Raises PecobookError."""
    return _run("codebook", recipe, settings)


def pretrain(recipe: str = DEFAULT_RECIPE, **settings: Unpack[PretrainKeywords]) -> Path:
    """Pre-train a ViT on tokens; return the run folder. Raises PecobookError."""
    return _run("pretrain", recipe, settings)


def finetune(recipe: str = DEFAULT_RECIPE, **settings: Unpack[FinetuneKeywords]) -> Path:
    """Fine-tune a backbone for classification; return the run folder. Raises PecobookError."""
    return _run("finetune", recipe, settings)


def segment(recipe: str = DEFAULT_RECIPE, **settings: Unpack[SegmentKeywords]) -> Path:
    """Train semantic segmentation; return the run folder. Raises PecobookError."""
    return _run("segment", recipe, settings)


def detect(recipe: str = DEFAULT_RECIPE, **settings: Unpack[DetectKeywords]) -> Path:
    """Train a detector of boxes and masks; return the run folder. Raises PecobookError."""
    return _run("detect", recipe, settings)


def tokenize(recipe: str = DEFAULT_RECIPE, **settings: Any) -> Path:
    """Write a token bank with the views of a `pretrain` recipe; return the folder. Raises PecobookError."""
    from pecobook.commands.tokenize import tokenize as write

    return write(replace(recipes.tokenize(recipe), settings))


def export(run: str, format: str = "timm", *, out: str) -> Path:  # noqa: A002
    """Write a run's weights for timm, transformers (hf) or ONNX (onnx); return the folder. Raises PecobookError."""
    from pecobook.commands.export import export as write
    from pecobook.settings.export import ExportConfig

    return write(replace(ExportConfig(), {"run": run, "format": format, "out": out}))


def predict(run: str, images: str, *, out: str, **settings: Any) -> Path:
    """Apply a finetune, segment or detect run to images; return the folder. Raises PecobookError."""
    from pecobook.commands.predict import predict as write
    from pecobook.settings.predict import PredictConfig

    return write(replace(PredictConfig(), {"run": run, "images": images, "out": out, **settings}))


def _run(command: str, name: str, keywords: Mapping[str, object]) -> Path:
    settings, objects = _objects(command, keywords)
    with giving(objects):
        config = replace(recipes.recipe(command, name), settings)
        bank: str = getattr(config, "tokens", "")
        if bank and "transform" in objects:
            raise ConfigError("transform= and tokens= exclude each other: a bank holds tokens of untransformed images.")
        if "transform" in objects and command == "finetune" and config.clip.frames:
            raise ConfigError("transform= takes single images, and clip.frames reads clips: leave out one of them.")
        return run(command, config, name)


def _objects(command: str, keywords: Mapping[str, object]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings, with names instead of objects, and the objects by setting (also `transform`, `on_step`)."""
    settings: dict[str, Any] = dict(keywords)
    is_dense = command in ("segment", "detect")
    objects = {kind: settings.pop(kind) for kind in ("transform", "on_step") if settings.get(kind) is not None}
    for kind, value in objects.items():
        if not callable(value):
            raise ConfigError(f"{kind}= takes a function, not {value!r}.")
    if is_dense and not isinstance(settings.get("data", ""), str | Path):
        raise ConfigError(f"data= takes the name of a source: {command} reads masks or boxes beside the images.")
    if "transform" in objects and is_dense:
        raise ConfigError(f"transform= would move images and not their masks or boxes: {command} takes none.")
    group = settings.get("perceptual")
    if isinstance(group, Mapping):
        settings["perceptual"] = {name: value for name, value in group.items() if name != "network"}
        settings.update({"perceptual.network": group["network"]} if "network" in group else {})
    elif group is not None and not isinstance(group, str):
        settings["perceptual.network"] = settings.pop("perceptual")
    for name in ("data", "tokenizer", "backbone", "perceptual.network"):
        value = settings.get(name)
        if value is not None and not isinstance(value, str | Path):
            if name == "backbone":
                from pecobook.models.given_networks import as_backbone

                objects[name] = as_backbone(value)
            else:
                objects[name] = value
            settings[name] = name_of(objects[name])
    return settings, objects
