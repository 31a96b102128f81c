"""Rules for imports between modules, checked on the source of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import pecobook

ROOT = Path(pecobook.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = ("pecobook", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file) for file in FILES}


def imports(file: Path) -> set[str]:
    """Return the full names of all modules that a file imports anywhere, in functions and for type checking too."""
    names: set[str] = set()
    package = module_name(file) if file.name == "__init__.py" else module_name(file).rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            # `from pecobook import cli` imports a module too; the name of a function does no harm here.
            full = {f"{base}.{alias.name}" for alias in node.names}
            names |= full if full <= MODULES else {base, *full}
    return names


def importers(*forbidden: str, within: str) -> dict[str, set[str]]:
    """Return the modules of the package `within` that import a module in or below `forbidden`."""
    wrong: dict[str, set[str]] = {}
    for file in FILES:
        name = module_name(file)
        if name == within or name.startswith(within + "."):
            bad = {
                imported
                for imported in imports(file)
                for root in forbidden
                if imported == root or imported.startswith(root + ".")
            }
            if bad:
                wrong[name] = bad
    return wrong


def test_imports__finds_imports_that_exist() -> None:
    """The tests below would also pass if no import was found."""
    assert len(FILES) > 25
    assert importers("pecobook.engine", within="pecobook.stages")
    assert importers("torch", within="pecobook.models.quantizer")
    assert importers("lightning_fabric", within="pecobook.engine.launch")


@pytest.mark.parametrize("package", ["data", "models", "engine"])
def test_imports__foundations_import_no_stage_and_no_command(package: str) -> None:
    forbidden = ("pecobook.stages", "pecobook.cli", "pecobook.analysis", "pecobook.recipes")
    assert importers(*forbidden, within=f"pecobook.{package}") == {}


def test_imports__data_and_models_import_no_engine() -> None:
    assert importers("pecobook.engine", within="pecobook.data") == {}
    assert importers("pecobook.engine", "pecobook.data", within="pecobook.models") == {}
    assert importers("pecobook.models", within="pecobook.data") == {}


def test_imports__stages_import_neither_each_other_nor_the_command_line() -> None:
    stages = {module_name(file) for file in (ROOT / "stages").glob("*.py")}
    stages -= {"pecobook.stages", "pecobook.stages.training"}
    assert len(stages) >= 4
    for stage in stages:
        assert importers("pecobook.cli", *(stages - {stage}), within=stage) == {}, stage
    assert importers("pecobook.cli", *stages, within="pecobook.stages.training") == {}


def test_imports__settings_import_only_errors_each_other_and_the_reader_of_json() -> None:
    assert len(SETTINGS) > 20
    allowed = ("pecobook.errors", "pecobook.settings", "pecobook.utils.json_files")
    for name, wrong in importers("pecobook", within="pecobook.settings").items():
        assert {
            imported for imported in wrong if imported != "pecobook" and not imported.startswith(allowed)
        } == set(), name


def test_imports__analysis_imports_no_training() -> None:
    assert importers("pecobook.stages", "pecobook.engine", "pecobook.cli", within="pecobook.analysis") == {}


@pytest.mark.parametrize(
    ("library", "only"),
    [("lightning_fabric", {"pecobook.engine"}), ("lightning", set())],
)
def test_imports__a_library_stays_where_it_belongs(library: str, only: set[str]) -> None:
    users = importers(library, within="pecobook")
    allowed = {name for name in users for root in only if name == root or name.startswith(root + ".")}
    assert set(users) == allowed


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return a chain of modules from a module to itself, each importing the next; empty when there is no circle."""
    finished: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for imported in sorted(graph.get(path[-1], ())):
            if imported in path:
                return [*path[path.index(imported) :], imported]
            if imported not in finished and (chain := search([*path, imported])):
                return chain
        finished.add(path[-1])
        return []

    return next((chain for module in sorted(graph) if (chain := search([module]))), [])


@pytest.mark.parametrize(
    ("graph", "chain"),
    [
        ({}, []),
        ({"a": {"b", "c"}, "b": {"c"}, "c": {"outside"}}, []),
        ({"a": {"a"}}, ["a", "a"]),
        ({"a": {"b"}, "b": {"a"}}, ["a", "b", "a"]),
        ({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"e"}, "e": {"b"}}, ["b", "d", "e", "b"]),
    ],
)
def test_circle__finds_a_planted_circle(graph: Mapping[str, set[str]], chain: list[str]) -> None:
    assert circle(graph) == chain


def test_imports__finds_imports_in_functions_and_for_type_checking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "module.py"
    file.write_text("if TYPE_CHECKING:\n    import a\nelse:\n    import b\n\ndef f():\n    from c import d\n")
    monkeypatch.setattr("tests.test_imports.ROOT", tmp_path)
    assert imports(file) == {"a", "b", "c", "c.d"}


def test_imports__form_no_circle() -> None:
    """Imports inside functions and for type checking count too, because such an import only hides a circle."""
    graph = {module_name(file): imports(file) & MODULES for file in FILES}
    assert "pecobook.data.folders" in graph["pecobook.data.images"]  # an import inside a function
    assert circle(graph) == []


def loaded_by(module: str) -> set[str]:
    """Return the top-level packages in memory after importing `module` in a fresh process."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


SETTINGS = [module_name(file) for file in FILES if file.parent.name in ("settings", "recipes")]


@pytest.mark.parametrize("module", ["pecobook.cli", "pecobook", "pecobook.utils.output_folder", ", ".join(SETTINGS)])
def test_imports__command_line_and_settings_load_no_torch(module: str) -> None:
    heavy = {"torch", "timm", "torchvision", "lightning_fabric", "datasets", "sklearn", "matplotlib", "pandas"}
    loaded = loaded_by(module)
    assert "pecobook" in loaded
    assert loaded & heavy == set()
