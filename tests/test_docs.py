"""The commands and flags in the guides can be parsed, and the links exist."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pecobook
from docs import site_pages
from pecobook import cli, recipes
from pecobook.commands.table import COMMANDS
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
GENERATED = site_pages.pages()
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


@functools.cache
def settings_of_all() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return the settings of every command, and the types of its flags."""
    configs = {**{command: recipe(command) for command in RECIPES}, **{name: kind() for name, kind in OTHERS.items()}}
    return {command: (config, {"resume": bool, **flags(type(config))}) for command, config in configs.items()}


def can_be_parsed(words: list[str]) -> bool:
    """Return whether some command takes these flags; a single flag without a value only has to exist."""
    for command, (config, names) in settings_of_all().items():
        name = words[0].removeprefix("--")
        if len(words) == 1 and (name in names or name.removeprefix("no-") in names):
            return True
        if len(words) > 1 and name in names:
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


PAGES = pytest.mark.parametrize(
    "page",
    sorted([*DOCS.rglob("*.md"), DOCS.parent / "README.md"]),
    ids=lambda page: str(page.relative_to(DOCS.parent)),
)


@PAGES
def test_links_exist(page: Path) -> None:
    """Of the site, whose build checks anchors too, and of the repository, where the generated pages do not exist."""
    generated = {DOCS / name for name in GENERATED}
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in link:
            target = (page.parent / link).resolve()
            assert target.exists() or target in generated, link


@PAGES
def test_lists_stand_behind_an_empty_line(page: Path) -> None:
    """As Python-Markdown wants them, which GitHub does not."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert re.findall(r"^(?![-*|#> ]|\d+\. )[^\n]+\n(?:[-*]|1\.) .*", text, flags=re.MULTILINE) == []


def test_site__every_page_is_in_its_navigation() -> None:
    (navigation,) = re.findall(r"^nav:\n(.*)", (DOCS.parent / "mkdocs.yml").read_text(), flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"\S+\.md", navigation))
    assert named == {*GENERATED, *(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))}


def test_generated_pages__hold_every_recipe_flag_and_name() -> None:
    recipe_page = GENERATED["reference/recipes.md"]
    assert all(f"### {command} {name} " in recipe_page for command, names in RECIPES.items() for name in names)
    assert "\n```text\npecobook codebook tiny --data photos --out runs/codebook\n```" in recipe_page
    assert "**Cost:** 1.2 GFLOP for an image" in recipe_page
    for command, content in COMMANDS.items():
        page = GENERATED[f"reference/{command}.md"]
        assert all(f"#### `--{name}`" in page for name in flags(content.settings)), command
    assert "(on)" in GENERATED["reference/predict.md"]
    assert all(f".{name}\n" in GENERATED["reference/api.md"] for name in pecobook.__all__)


def test_troubleshooting__headings_are_texts_of_the_source() -> None:
    texts = site_pages.all_texts()
    headings = re.findall(r"^### (.*)", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(headings) >= 30
    assert [heading for heading in headings if not _is_in_source(heading, texts)] == []
    assert not _is_in_source("--out '…' is not vacant", texts)


def _is_in_source(heading: str, texts: list[str]) -> bool:
    """Whether one text holds the fixed parts of a heading in their order."""
    parts = [re.escape(part) for part in heading.split("…")]
    return any(re.search(".*".join(parts), text) for text in texts)


def test_messages__hold_errors_notes_and_warnings() -> None:
    page = GENERATED["reference/messages.md"].replace("\\", "")
    texts = re.findall(r"^- (.*)", page, flags=re.MULTILINE)
    assert "--out '…' is not empty…." in texts
    assert any(text.startswith("Warning: '…' uses less than an eighth of the range …") for text in texts)
    assert any(text.startswith("--FLAG must lie in […, …], not …") for text in texts)


@PAGES
def test_python_blocks__import_existing_names(page: Path) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        body = ast.parse(block).body
        imported = [node for node in body if isinstance(node, ast.ImportFrom)]
        for node in imported:
            assert node.module is not None
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


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


_STUB = """#!{python}
import json, os, pathlib, sys
program, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
if program == "curl":  # makes the file of -o, or under the last part of the address
    target = words[words.index("-o") + 1] if "-o" in words else words[-1].rpartition("/")[2]
    pathlib.Path(target).write_text("data")
if program == "unzip":
    archive = pathlib.Path(next(word for word in words if word.endswith(".zip")))
    (pathlib.Path(words[-1]) if "-d" in words else archive.with_suffix("")).mkdir(exist_ok=True)
if program == "python":
    for split in ("train", "val"):
        pathlib.Path("downloads", split).mkdir(parents=True)
if program == "pecobook":
    inputs = [word.rpartition(":")[2] for flag, word in zip(words, words[1:]) if flag in {inputs}]
    names = [word for word in inputs if word.isupper() or "/" in word or word.startswith("ADE")]
    missing = [name for name in names if not os.path.exists(name)]
    assert not missing, (words, missing)
    if "--out" in words:
        pathlib.Path(words[words.index("--out") + 1]).mkdir(parents=True, exist_ok=True)
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps([os.getcwd(), *words]) + "\\n")
"""
_INPUTS = (
    *("--data", "--tokenizer", "--tokens", "--backbone", "--against", "--dalle", "--perceptual.network"),
    *("--perceptual.weights", "--segmentation-data", "--detection-data"),
)


@pytest.mark.parametrize("kaggle", [False, True], ids=["archives", "kaggle"])
def test_from_zero__every_line_finds_what_earlier_lines_made(tmp_path: Path, kaggle: bool) -> None:
    """The page from its first line to its last in one shell, with stubs for what downloads or trains."""
    programs, folder = tmp_path / "bin", tmp_path / "it's here"
    for place in (programs, folder, folder / "KINETICS", folder / "SSV2"):
        place.mkdir()
    for name in ("curl", "unzip", "python", "pecobook", "pip", "hf"):
        (programs / name).write_text(_STUB.replace("{python}", sys.executable).replace("{inputs}", repr(_INPUTS)))
        (programs / name).chmod(0o755)
    images, solution = folder / "ILSVRC" / "Data" / "CLS-LOC", "ILSVRC2012_val_0000000"
    (images / "train" / "n01").mkdir(parents=True)
    (images / "val").mkdir()
    for number in (1, 2):
        (images / "val" / f"{solution}{number}.JPEG").touch()
    # Boxes follow the class, more than one in some images, and the last line may lack its end.
    lines = f"ImageId,PredictionString\n{solution}1,n02 85 1 499 272 \n{solution}2,n01 1 2 3 4 n01 5 6 7 8 "
    (folder / "LOC_val_solution.csv").write_text(lines)
    blocks = re.findall(r"```(?:ba)?sh\n(.*?)```", (DOCS / "from-zero.md").read_text(), flags=re.DOTALL)
    left_out = "torchvision.datasets" if kaggle else "LOC_val_solution"  # one way to ImageNet or the other
    script = "set -euo pipefail\n" + "".join(block for block in blocks if left_out not in block)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    subprocess.run(["bash", "-c", script], cwd=folder, env=environment, check=True)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert {call[0] for call in calls} == {str(folder)}
    assert len(calls) > 12
    if kaggle:
        found = sorted(str(file.relative_to(folder / "IMAGENET")) for file in (folder / "IMAGENET").rglob("*.JPEG"))
        assert found == [f"val/n01/{solution}2.JPEG", f"val/n02/{solution}1.JPEG"]
