"""Recipes: named settings with a documented claim. Each public function of the modules here is a recipe; an alias
is an assignment below it. `pecobook recipes` lists all recipes.

The first line of a docstring is the claim; "Source", "Command", "Cost" and "Result" follow where they are known. A
result belongs to exactly these settings, or names the settings it belongs to. The `tiny` recipes run the same code as
the others with smaller numbers, in about a minute on 2 cores. The tests train them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeAlias

from pecobook.errors import ConfigError, did_you_mean
from pecobook.recipes import codebook, contrast, detect, finetune, pretrain, segment
from pecobook.settings.tokenize import VIEW_SETTINGS, TokenizeConfig
from pecobook.settings.training import TrainConfig

Recipe: TypeAlias = Callable[[], TrainConfig]


def _recipes_in(module: ModuleType) -> dict[str, Recipe]:
    """Return the public functions of a module, each a recipe, in source order and keyed by name with dashes."""
    return {
        name.replace("_", "-"): value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


RECIPES: dict[str, dict[str, Recipe]] = {
    "contrast": _recipes_in(contrast),
    "codebook": _recipes_in(codebook),
    "pretrain": _recipes_in(pretrain),
    "finetune": _recipes_in(finetune),
    "segment": _recipes_in(segment),
    "detect": _recipes_in(detect),
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
    """Return the settings of a token bank with the views of a `pretrain` recipe. Raises ConfigError like `recipe`."""
    base = recipe("pretrain", name)
    return TokenizeConfig(**{name: getattr(base, name) for name in VIEW_SETTINGS})


def claim(command: str, name: str) -> str:
    """Return a recipe's claim, one sentence; for an alias, the name that it stands for."""
    text = story(command, name).splitlines()[0]
    recipes = RECIPES[command]
    first = next(other for other in recipes if recipes[other] is recipes[name])
    return text if first == name else f"Another name of '{first}'."


def story(command: str, name: str) -> str:
    """Return a recipe's documentation: claim, source, command, cost, result. Raises ConfigError like `recipe`."""
    recipe(command, name)
    return inspect.getdoc(RECIPES[command][name]) or ""


def claims() -> list[tuple[str, str, str]]:
    """Return the command, name and claim of every recipe."""
    return [(command, name, claim(command, name)) for command, recipes in RECIPES.items() for name in recipes]
