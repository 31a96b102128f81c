"""Recipes: named settings with a documented claim. A recipe is a function; `pecobook recipes` lists all recipes.

The first line of a docstring is the claim; "Source", "Command", "Cost" and "Result" follow where they are known. A
result belongs to exactly these settings, or names the settings it belongs to. The `tiny` recipes run the code of the
others with smaller numbers: about a minute on 2 cores. The tests train them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from pecobook.errors import ConfigError, did_you_mean
from pecobook.recipes import codebook, contrast, detect, finetune, pretrain, segment
from pecobook.settings.tokenize import VIEW_SETTINGS, TokenizeConfig
from pecobook.settings.training import TrainConfig

Recipe: TypeAlias = Callable[[], TrainConfig]


def _named(*recipes: Recipe) -> dict[str, Recipe]:
    """Return recipes by the names of their functions, with dashes."""
    return {recipe.__name__.replace("_", "-"): recipe for recipe in recipes}


RECIPES: dict[str, dict[str, Recipe]] = {
    "contrast": _named(
        contrast.tiny,
        contrast.cifar10,
        contrast.tiny_imagenet,
        contrast.imagenette,
        contrast.paper,
        contrast.paper_resnet50,
    ),
    "codebook": _named(
        codebook.tiny,
        codebook.cifar10,
        codebook.tiny_imagenet,
        codebook.imagenette,
        codebook.imagenette_224,
        codebook.paper,
        codebook.paper_lite,
        codebook.paper_resnet50,
        codebook.paper_vgg16,
        codebook.modern_dinov3,
        codebook.vqkd,
    ),
    "pretrain": _named(
        pretrain.tiny,
        pretrain.cifar10,
        pretrain.tiny_imagenet,
        pretrain.imagenette,
        pretrain.paper,
        pretrain.paper_vit_b_300,
    )
    | {"paper-vit-b-800": pretrain.paper}
    | _named(pretrain.paper_vit_l, pretrain.paper_vit_h, pretrain.paper_mae),
    "finetune": _named(
        finetune.tiny,
        finetune.tiny_video,
        finetune.cifar10,
        finetune.tiny_imagenet,
        finetune.imagenette,
        finetune.paper,
        finetune.paper_vit_l,
        finetune.paper_vit_h,
        finetune.paper_vit_h_448,
        finetune.paper_mae,
        finetune.paper_scratch,
        finetune.paper_deit,
        finetune.paper_video,
        finetune.paper_video_ssv2,
        finetune.paper_video_deit,
    ),
    "segment": _named(segment.tiny, segment.camvid)
    | {"paper": segment.paper_ade20k, "paper-ade20k": segment.paper_ade20k},
    "detect": _named(detect.tiny, detect.nuclei) | {"paper": detect.paper_coco, "paper-coco": detect.paper_coco},
}

DEFAULT_RECIPE = "paper"


def recipe(command: str, name: str = DEFAULT_RECIPE) -> Any:
    """Return the settings of a recipe. Raises ConfigError for an unknown recipe."""
    names = RECIPES[command]
    if name not in names:
        suggestion = did_you_mean(name, names)
        raise ConfigError(f"'{command}' has no recipe '{name}': its recipes are {', '.join(names)}.{suggestion}")
    return names[name]()


def tokenize(name: str = DEFAULT_RECIPE) -> TokenizeConfig:
    """Return the settings of a token bank with the views of a `pretrain` recipe. Raises ConfigError as `recipe`."""
    base = recipe("pretrain", name)
    return TokenizeConfig(**{name: getattr(base, name) for name in VIEW_SETTINGS})


def claim(command: str, name: str) -> str:
    """Return the claim of a recipe, one sentence; of a second name, the first name of the recipe."""
    text = story(command, name).splitlines()[0]
    recipes = RECIPES[command]
    first = next(other for other in recipes if recipes[other] is recipes[name])
    return text if first == name else f"Another name of '{first}'."


def story(command: str, name: str) -> str:
    """Return the documentation of a recipe: claim, source, command, cost, result. Raises ConfigError as `recipe`."""
    recipe(command, name)
    return inspect.getdoc(RECIPES[command][name]) or ""


def claims() -> list[tuple[str, str, str]]:
    """Return command, name and claim of every recipe."""
    return [(command, name, claim(command, name)) for command, recipes in RECIPES.items() for name in recipes]
