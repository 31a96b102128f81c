from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest

from pecobook import cli
from pecobook.data.images import open_images
from pecobook.engine import launch
from pecobook.errors import ConfigError
from pecobook.recipes import DEFAULT_RECIPE, RECIPES, claims, recipe
from pecobook.settings.durations import steps
from pecobook.settings.training import TrainConfig
from tests.runs import export_bytes, logged

EVERY = [(command, name) for command, recipes in RECIPES.items() for name in recipes]


def docstring(command: str, name: str) -> str:
    return inspect.getdoc(RECIPES[command][name]) or ""


@pytest.mark.parametrize(("command", "name"), EVERY)
def test_recipe__loads_and_its_documented_command_is_itself(command: str, name: str) -> None:
    config = recipe(command, name)
    assert isinstance(config, TrainConfig)
    assert launch.micro_batch_size(config) >= 1
    assert steps(config.max_steps, num_images=50_000, batch_size=config.batch_size) > 0
    (line,) = re.findall(r"^Command: (.+)$", docstring(command, name), re.MULTILINE)
    words = shlex.split(line)
    assert words[:2] == ["pecobook", command]
    assert RECIPES[command][words[2]] is RECIPES[command][name]  # by this name or another of its
    parsed = cli.parse(recipe(*words[1:3]), words[3:], f"{command} {name}")
    assert parsed.out.startswith("runs/")
    needed = {"pretrain": "tokenizer", "finetune": "backbone"}.get(command)
    if needed:
        assert getattr(parsed, needed).startswith("runs/")
    if command == "codebook":
        assert parsed.perceptual.network in ("none", "runs/contrast", "torchvision:vgg16")


@pytest.mark.parametrize(("command", "name"), [pair for pair in EVERY if pair[1] != "tiny"])
def test_recipe__says_whether_it_was_run(command: str, name: str) -> None:
    assert re.search(r"^Result: \S", docstring(command, name), re.MULTILINE)
    if name.startswith("paper"):
        assert re.search(r"^Source: \S", docstring(command, name), re.MULTILINE)
    if command in ("contrast", "codebook"):
        assert re.search(r"^Cost: \S", docstring(command, name), re.MULTILINE)


def test_recipe__every_command_has_a_tiny_and_the_default() -> None:
    dense = {"segment": {"camvid"}, "detect": {"nuclei"}}
    assert set(RECIPES) == {"contrast", "codebook", "pretrain", "finetune", *dense}
    for command, recipes in RECIPES.items():
        assert {"tiny", DEFAULT_RECIPE} | dense.get(command, {"cifar10", "tiny-imagenet"}) <= set(recipes)


def test_recipe__an_unknown_one_is_told_with_the_known() -> None:
    with pytest.raises(ConfigError, match=r"'codebook' has no recipe 'papr': .*paper-lite.* Did you mean 'paper'\?"):
        recipe("codebook", "papr")


def test_claims__one_sentence_each() -> None:
    found = claims()
    assert [(command, name) for command, name, _ in found] == EVERY
    assert all(claim.endswith(".") and len(claim) > 15 for _, _, claim in found)


def test_tiny__the_whole_path_from_images_to_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `tiny` recipe as it stands, on the built-in photographs, for a few steps of a small batch."""
    monkeypatch.chdir(tmp_path)
    assert len(open_images("photos").train) > 1000
    for command in ("contrast", "codebook", "pretrain", "finetune"):
        (line,) = re.findall(r"^Command: (.+)$", docstring(command, "tiny"), re.MULTILINE)
        few = "--max-steps 3 --batch-size 8 --log-every 1 --sample-every 3 --evaluation-images 16 --loggers"
        cli.main(shlex.split(line)[1:] + few.split())
    for run in ("contrast", "codebook", "vit", "classifier"):
        lines = logged(Path("runs") / run)
        assert [entry["step"] for entry in lines] == [1, 2, 3]
        assert lines[-1]["evaluation/loss"] > 0
        assert "model.safetensors" in export_bytes(Path("runs") / run)
    assert (Path("runs") / "codebook" / "samples" / "step-00000003.png").exists()
