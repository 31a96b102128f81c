from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from pecobook import cli
from pecobook.commands.reproduce.budgets import make_budget
from pecobook.data.images import open_images
from pecobook.engine import launch
from pecobook.errors import ConfigError
from pecobook.recipes import DEFAULT_RECIPE, RECIPES, claims, recipe
from pecobook.settings.codebook import AdversarialConfig, CodebookConfig, ExplicitConfig
from pecobook.settings.durations import steps
from pecobook.settings.images import IMAGENET_MEAN, IMAGENET_STD
from pecobook.settings.pretrain import DecoderConfig, PretrainConfig
from pecobook.settings.tokenizer import AutoencoderConfig, QuantizerConfig
from pecobook.settings.training import BaseOptimConfig, TrainConfig
from pecobook.settings.values import replace, to_dict
from pecobook.stages.classify import load_for_classification
from tests.runs import export_bytes, logged

EVERY = [(command, name) for command, recipes in RECIPES.items() for name in recipes]


def docstring(command: str, name: str) -> str:
    return inspect.getdoc(RECIPES[command][name]) or ""


@pytest.mark.parametrize(("command", "name"), EVERY)
def test_recipe__loads_and_documents_its_own_command(command: str, name: str) -> None:
    config = recipe(command, name)
    assert isinstance(config, TrainConfig)
    assert launch.micro_batch_size(config) >= 1
    assert steps(config.max_steps, num_images=50_000, batch_size=config.batch_size) > 0
    (line,) = re.findall(r"^Command: (.+)$", docstring(command, name), re.MULTILINE)
    words = shlex.split(line)
    assert words[:2] == ["pecobook", command]
    assert RECIPES[command][words[2]] is RECIPES[command][name]  # by this name or another name of the recipe
    parsed = cli.parse(recipe(*words[1:3]), words[3:], f"{command} {name}")
    assert parsed.out.startswith("runs/")
    if command == "pretrain":
        assert parsed.tokenizer.startswith("runs/") == (parsed.target == "tokens")
    if command == "finetune":
        assert parsed.backbone.startswith("timm:" if parsed.weights == "random" else "runs/")
    if command == "codebook":
        assert parsed.perceptual.network.startswith(("none", "runs/contrast", "torchvision:vgg16", "timm:"))


@pytest.mark.parametrize(("command", "name"), [pair for pair in EVERY if pair[1] != "tiny"])
def test_recipe__documents_its_source_and_its_cost(command: str, name: str) -> None:
    assert "not yet run." not in docstring(command, name)
    if name.startswith("paper"):
        assert re.search(r"^Source: \S", docstring(command, name), re.MULTILINE)
    if command in ("contrast", "codebook"):
        assert re.search(r"^Cost: \S", docstring(command, name), re.MULTILINE)


# Settings that a paper recipe leaves to the user or to the machine.
NOT_THE_PAPERS = {
    *("data", "out", "seed", "devices", "num_nodes", "strategy", "precision", "micro_batch_size", "workers", "loggers"),
    *("log_every", "save_every", "save_minutes", "keep_checkpoints", "sample_every", "evaluation_images", "knn_images"),
    *("tracking", "project", "entity", "group", "tags", "offline", "communication", "attention"),
    *(
        "compile",
        "compile_mode",
        "deterministic",
        "resume",
        "overwrite",
        "backbone",
        "weights",
        "tokenizer",
        "tokens",
        "network",
    ),
    *("init", "probe_data", "probe_every", "probe_images", "attention", "communication", "shuffle_window", "residual"),
    *(
        "classes",
        "value_range",
        "dry_run",
        "verify",
        "verify_data",
        "accept_data_change",
        "skip_bad",
        "shuffle",
        "mean",
        "std",
        "bgr",
    ),
}
# Settings without effect under the other settings of the recipe.
INERT = {
    *((AdversarialConfig, name) for name in ("width", "num_layers", "start")),  # weight 0
    *((ExplicitConfig, name) for name in ("weight", "temperature", "momentum", "hidden_dim", "output_dim")),  # none
    *((DecoderConfig, name) for name in ("depth", "width", "num_heads")),  # not visible_only
    (CodebookConfig, "target"),  # no --target-features
    *((QuantizerConfig, name) for name in ("levels", "entropy_weight", "entropy_temperature")),  # kind ema
    *((PretrainConfig, "decoder"), (AutoencoderConfig, "num_heads")),
}
# Settings of the optimizer that a schedule does not read.
INERT_UNDER = {
    "cosine": {"power", "milestones", "cooldown"},
    "poly": {"milestones", "cooldown"},
    "steps": {"power", "final_lr", "cooldown"},
}


class Edited:
    """A changed default."""


@pytest.mark.parametrize(("command", "name"), [pair for pair in EVERY if pair[1].startswith("paper")])
def test_paper_recipe__does_not_depend_on_defaults(command: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function = RECIPES[command][name]
    before = to_dict(function())
    kinds: list[Any] = [
        type(function()),
        *(type(value) for value in vars(function()).values() if dataclasses.is_dataclass(value)),
    ]
    tried = 0
    for kind in kinds:
        for field in dataclasses.fields(kind):
            if field.name in NOT_THE_PAPERS or (kind, field.name) in INERT:
                continue
            if issubclass(kind, BaseOptimConfig) and field.name in INERT_UNDER[function().optim.schedule]:
                continue
            init: Any = kind.__init__.__wrapped__  # of the dataclass, within the check of choices
            with monkeypatch.context() as edited:
                edited.setitem(init.__kwdefaults__, field.name, Edited())
                assert to_dict(function()) == before, f"{kind.__name__}.{field.name} is left to its default"
            tried += 1
    assert tried > 15


@pytest.mark.parametrize("name", ["paper-scratch", "paper-deit"])
def test_recipe__from_random_weights_normalises_as_the_code_of_mae_and_deit(name: str) -> None:
    """timm's mean for `vit_base_patch16_224`, and for this smaller ViT, is 0.5: that of augreg's weights."""
    backbone = load_for_classification(replace(recipe("finetune", name), {"backbone": "timm:vit_tiny_patch16_224"}))
    assert (backbone.mean, backbone.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_recipe__of_mae_ends_at_the_learning_rate_of_its_code() -> None:
    own = [runs.own["mae"] for size, runs in make_budget("paper").vits.items() if size != "visible"]
    assert {config.optim.final_lr for config in [recipe("finetune", "paper-mae"), *own]} == {1e-6}


def test_recipe__every_command_has_a_tiny_and_a_default_recipe() -> None:
    dense = {"segment": {"camvid"}, "detect": {"nuclei"}}
    assert set(RECIPES) == {"contrast", "codebook", "pretrain", "finetune", *dense}
    for command, recipes in RECIPES.items():
        assert {"tiny", DEFAULT_RECIPE} | dense.get(command, {"cifar10", "tiny-imagenet"}) <= set(recipes)


def test_recipe__an_unknown_name_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match=r"'codebook' has no recipe 'papr': .*paper-lite.* Did you mean 'paper'\?"):
        recipe("codebook", "papr")


def test_claims__are_one_sentence_each() -> None:
    assert [(command, name) for command, name, _ in claims()] == EVERY
    assert all(claim.endswith(".") and len(claim) > 15 for _, _, claim in claims())
    assert len({(command, claim) for command, _, claim in claims()}) == len(EVERY)


def test_claims__say_which_recipes_have_two_names() -> None:
    second_names = [f"{command} {name}: {claim}" for command, name, claim in claims() if claim.startswith("Another")]
    assert second_names == [
        "pretrain paper-vit-b-800: Another name of 'paper'.",
        "segment paper-ade20k: Another name of 'paper'.",
        "detect paper-coco: Another name of 'paper'.",
    ]


def test_tiny__recipes_lead_from_images_to_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `tiny` recipe runs on the built-in photographs, for a few steps with a small batch."""
    monkeypatch.chdir(tmp_path)
    assert len(open_images("photos").train) > 1000
    for command in ("contrast", "codebook", "pretrain", "finetune"):
        (line,) = re.findall(r"^Command: (.+)$", docstring(command, "tiny"), re.MULTILINE)
        small = "--max-steps 3 --batch-size 8 --log-every 1 --sample-every 3 --evaluation-images 16 --loggers"
        cli.main(shlex.split(line)[1:] + small.split())
    for run in ("contrast", "codebook", "vit", "classifier"):
        lines = logged(Path("runs") / run)
        assert [entry["step"] for entry in lines] == [1, 2, 3]
        assert lines[-1]["evaluation/loss"] > 0
        assert "model.safetensors" in export_bytes(Path("runs") / run)
    assert (Path("runs") / "codebook" / "samples" / "step-00000003.png").exists()
