"""The commands and flags in the guides can be parsed, and the links exist."""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from pecobook import cli, recipes
from pecobook.commands.embed import embed
from pecobook.errors import ConfigError
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.recipes import RECIPES, recipe
from pecobook.settings.analyze import AnalyzeConfig
from pecobook.settings.check import CheckConfig
from pecobook.settings.embed import EmbedConfig
from pecobook.settings.evaluate import EvaluateConfig
from pecobook.settings.explore import ExploreConfig
from pecobook.settings.export import ExportConfig
from pecobook.settings.predict import PredictConfig
from pecobook.settings.probe import ProbeConfig
from pecobook.settings.reproduce import ReproduceConfig
from pecobook.settings.tokenize import TokenizeConfig
from pecobook.settings.tokenizer import AutoencoderConfig, TokenizerConfig
from pecobook.settings.values import flags

DOCS = Path(__file__).parent.parent / "docs"
OTHERS: dict[str, Any] = {
    "analyze": AnalyzeConfig,
    "check": CheckConfig,
    "embed": EmbedConfig,
    "evaluate": EvaluateConfig,
    "explore": ExploreConfig,
    "export": ExportConfig,
    "predict": PredictConfig,
    "probe": ProbeConfig,
    "reproduce": ReproduceConfig,
    "tokenize": TokenizeConfig,
}


def flags_in(page: str) -> list[list[str]]:
    """Return the words of every piece of inline code that begins with a flag."""
    return [shlex.split(code) for code in re.findall(r"`(--[^`]+)`", (DOCS / page).read_text())]


def can_be_parsed(words: list[str]) -> bool:
    """Return whether some command takes these flags; a single flag without a value only has to exist."""
    configs = {command: recipe(command, "paper") for command in RECIPES}
    for command, config in {**configs, **{name: kind() for name, kind in OTHERS.items()}}.items():
        names = {"resume": bool, **flags(type(config))}
        if len(words) == 1 and words[0].removeprefix("--").removeprefix("no-") in names:
            return True
        if len(words) > 1:
            with contextlib.suppress(ConfigError):
                cli.parse(config, words, f"{command} paper")
                return True
    return False


@pytest.mark.parametrize(
    ("page", "minimum"),
    [
        ("codebook.md", 25),
        ("pretraining.md", 15),
        ("dense.md", 15),
        ("analysis.md", 10),
        ("data.md", 15),
        ("embed.md", 10),
        ("evaluate.md", 12),
    ],
)
def test_guides__every_flag_exists(page: str, minimum: int) -> None:
    pieces = flags_in(page)
    assert len(pieces) >= minimum
    assert [words for words in pieces if not can_be_parsed(words)] == []
    assert not can_be_parsed(["--perceptual.network"[:-1], "x"])


@pytest.mark.parametrize(
    ("page", "minimum"),
    [
        *(("pretraining.md", 7), ("dense.md", 5), ("analysis.md", 3)),
        *(("from-zero.md", 15), ("study.md", 3), ("embed.md", 3), ("evaluate.md", 4)),
    ],
)
def test_guides__every_command_can_be_parsed(page: str, minimum: int) -> None:
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
        for line in block.splitlines()
    ]
    assert len(lines) >= minimum
    for line in lines:
        program, command, *words = shlex.split(line)
        if program == "pip":
            continue
        assert program == "pecobook"
        first = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
        positional, flagged = words[:first], words[first:]
        if command in RECIPES:
            cli.parse(recipe(command, *positional), flagged, f"{command} {positional}")
        elif command == "tokenize":
            cli.parse(recipes.tokenize(*positional), flagged, "tokenize")
        else:
            assert bool(positional) == (
                command in ("embed", "evaluate", "export", "predict", "reproduce", "explore")
            ), line
            cli.parse(OTHERS[command](), flagged, command)


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", sorted([*DOCS.glob("*.md"), DOCS.parent / "README.md"]), ids=lambda page: page.name)
def test_python_blocks__import_existing_names(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        body = ast.parse(block).body
        imported = [node for node in body if isinstance(node, ast.ImportFrom)]
        assert imported or any(ast.unparse(node).startswith(("import pecobook", "pecobook.")) for node in body)
        for node in imported:
            assert node.module is not None
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_embed_guide__python_runs(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed(
        backbone="timm:test_vit",
        weights="random",
        image_size=32,
        data=str(images),
        out=str(tmp_path / "features.parquet"),
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / "embed.md").read_text(), flags=re.DOTALL):
        exec(block, names)
    assert names["neighbours"].shape == (len(names["vectors"]), 6)
    assert len(names["scores"]) == len(names["names"]) > 6


def test_evaluate_guide__python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = AutoencoderConfig(channels=(8, 16), latent_dim=8, num_blocks=1)
    config = TokenizerConfig(model=model, num_codewords=16, image_size=16)
    PerceptualTokenizer(config).save_pretrained(tmp_path / "runs" / "codebook")
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS / "evaluate.md").read_text(), flags=re.DOTALL)
    exec(block, {})
    assert capsys.readouterr().out.startswith("codebook ")
