"""The commands as functions: `pecobook.codebook(recipe="cifar10", data=..., out=...)`.

Keywords have the names of the flags: `perceptual={"network": "timm:resnet50"}` or
`**{"perceptual.network": "timm:resnet50"}`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pecobook import recipes
from pecobook.recipes import DEFAULT_RECIPE
from pecobook.settings.training import TrainConfig
from pecobook.settings.values import replace


def run(command: str, config: TrainConfig, recipe: str = "") -> Path:
    """Train the stage of a command with complete settings; return the run folder.

    `recipe` is the name of the recipe from which the settings come, with which config.diff compares them.
    """
    from pecobook.engine.stage import Stage
    from pecobook.stages.classify import ClassifyStage
    from pecobook.stages.codebook import CodebookStage
    from pecobook.stages.detect import DetectStage
    from pecobook.stages.moco import MocoStage
    from pecobook.stages.pretrain import PretrainStage
    from pecobook.stages.segment import SegmentStage
    from pecobook.stages.training import train

    stages: tuple[type[Stage[Any]], ...]
    stages = (MocoStage, CodebookStage, PretrainStage, ClassifyStage, SegmentStage, DetectStage)
    by_command: dict[str, type[Stage[Any]]] = {stage.command: stage for stage in stages}
    return train(by_command[command], config, recipe)


def contrast(recipe: str = DEFAULT_RECIPE, **settings: Any) -> Path:
    """Train a feature network by MoCo v3; return the run folder. Raises PecobookError."""
    return _run("contrast", recipe, settings)


def codebook(recipe: str = DEFAULT_RECIPE, **settings: Any) -> Path:
    """Train a perceptual codebook; return the run folder. Raises PecobookError."""
    return _run("codebook", recipe, settings)


def pretrain(recipe: str = DEFAULT_RECIPE, **settings: Any) -> Path:
    """Pre-train a ViT on tokens; return the run folder. Raises PecobookError."""
    return _run("pretrain", recipe, settings)


def finetune(recipe: str = DEFAULT_RECIPE, **settings: Any) -> Path:
    """Fine-tune a backbone for classification; return the run folder. Raises PecobookError."""
    return _run("finetune", recipe, settings)


def segment(recipe: str = DEFAULT_RECIPE, **settings: Any) -> Path:
    """Train semantic segmentation; return the run folder. Raises PecobookError."""
    return _run("segment", recipe, settings)


def detect(recipe: str = DEFAULT_RECIPE, **settings: Any) -> Path:
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
    """Apply a run of finetune, segment or detect to images; return the folder. Raises PecobookError."""
    from pecobook.commands.predict import predict as write
    from pecobook.settings.predict import PredictConfig

    return write(replace(PredictConfig(), {"run": run, "images": images, "out": out, **settings}))


def _run(command: str, name: str, settings: dict[str, Any]) -> Path:
    return run(command, replace(recipes.recipe(command, name), settings), name)
