"""Who may import whom, read from the source of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pecobook

ROOT = Path(pecobook.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = ("pecobook", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> set[str]:
    """Full names of all modules a file imports, wherever in it."""
    found: set[str] = set()
    package = module_name(file) if file.name == "__init__.py" else module_name(file).rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            # `from pecobook import cli` imports a module too; a name that is none does no harm here.
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def importers(*forbidden: str, within: str) -> dict[str, set[str]]:
    """Modules of the package `within` that import something below one of `forbidden`."""
    wrong: dict[str, set[str]] = {}
    for file in FILES:
        name = module_name(file)
        if name == within or name.startswith(within + "."):
            bad = {one for one in imports(file) for root in forbidden if one == root or one.startswith(root + ".")}
            if bad:
                wrong[name] = bad
    return wrong


def test_imports__sees_what_it_should() -> None:
    """The tests below would pass on an empty list, so first that the reader reads."""
    assert len(FILES) > 25
    assert importers("pecobook.engine", within="pecobook.stages")
    assert importers("torch", within="pecobook.models.quantizer")
    assert importers("lightning_fabric", within="pecobook.engine.launch")


@pytest.mark.parametrize("package", ["data", "models", "engine"])
def test_imports__foundations_know_no_stage_and_no_command(package: str) -> None:
    forbidden = ("pecobook.stages", "pecobook.cli", "pecobook.analysis", "pecobook.recipes")
    assert importers(*forbidden, within=f"pecobook.{package}") == {}


def test_imports__data_and_models_know_no_engine() -> None:
    assert importers("pecobook.engine", within="pecobook.data") == {}
    assert importers("pecobook.engine", "pecobook.data", within="pecobook.models") == {}
    assert importers("pecobook.models", within="pecobook.data") == {}


def test_imports__stages_know_neither_each_other_nor_the_command_line() -> None:
    stages = {module_name(file) for file in (ROOT / "stages").glob("*.py")}
    stages -= {"pecobook.stages", "pecobook.stages.training"}
    assert len(stages) >= 4
    for stage in stages:
        assert importers("pecobook.cli", *(stages - {stage}), within=stage) == {}, stage
    assert importers("pecobook.cli", *stages, within="pecobook.stages.training") == {}


def test_imports__settings_know_errors_and_each_other_alone() -> None:
    assert len(SETTINGS) > 20
    allowed = ("pecobook.errors", "pecobook.settings", "pecobook.files")
    for name, wrong in importers("pecobook", within="pecobook.settings").items():
        assert {one for one in wrong if one != "pecobook" and not one.startswith(allowed)} == set(), name


def test_imports__analysis_knows_no_training() -> None:
    assert importers("pecobook.stages", "pecobook.engine", "pecobook.cli", within="pecobook.analysis") == {}


@pytest.mark.parametrize(
    ("library", "only"),
    [("tyro", {"pecobook.cli"}), ("lightning_fabric", {"pecobook.engine"}), ("lightning", set())],
)
def test_imports__a_library_stays_where_it_belongs(library: str, only: set[str]) -> None:
    users = importers(library, within="pecobook")
    assert {name for name in users if not any(name == one or name.startswith(one + ".") for one in only)} == set()


def loaded_by(module: str) -> set[str]:
    """Top-level packages in memory after importing `module` in a fresh process."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


SETTINGS = [module_name(file) for file in FILES if file.parent.name in ("settings", "recipes")]


@pytest.mark.parametrize("module", ["pecobook.cli", "pecobook", ", ".join(SETTINGS)])
def test_imports__the_command_line_its_settings_and_recipes_do_without_torch(module: str) -> None:
    heavy = {"torch", "timm", "torchvision", "lightning_fabric", "datasets", "sklearn", "matplotlib", "pandas"}
    loaded = loaded_by(module)
    assert "pecobook" in loaded
    assert loaded & heavy == set()
