"""Who may import whom, read from the source of every module."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import pecobook

ROOT = Path(pecobook.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))


def module_name(file: Path) -> str:
    parts = ("pecobook", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file) for file in FILES}


def is_for_types_alone(node: ast.AST) -> bool:
    """Whether `node` is an `if TYPE_CHECKING:`, whose imports never happen."""
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def walk(node: ast.AST, *, types: bool) -> Iterator[ast.AST]:
    """All nodes below `node`; without `types`, not those that stand under `if TYPE_CHECKING:`."""
    for child in ast.iter_child_nodes(node):
        if types or not is_for_types_alone(child):
            yield child
            yield from walk(child, types=types)
        elif isinstance(child, ast.If):
            yield from (node for other in child.orelse for node in (other, *walk(other, types=types)))


def imports(file: Path, *, types: bool = True) -> set[str]:
    """Full names of all modules a file imports, wherever in it; without `types`, only imports that happen."""
    found: set[str] = set()
    package = module_name(file) if file.name == "__init__.py" else module_name(file).rpartition(".")[0]
    for node in walk(ast.parse(file.read_text()), types=types):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            # `from pecobook import cli` imports a module too; a name that is none does no harm here.
            full = {f"{base}.{alias.name}" for alias in node.names}
            found |= full if full <= MODULES else {base, *full}
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
    allowed = ("pecobook.errors", "pecobook.settings")
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


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """A chain of modules each of which imports the next, from a module to itself; empty when there is none."""
    finished: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for after in sorted(graph.get(path[-1], ())):
            if after in path:
                return [*path[path.index(after) :], after]
            if after not in finished and (found := search([*path, after])):
                return found
        finished.add(path[-1])
        return []

    return next((found for module in sorted(graph) if (found := search([module]))), [])


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        ({}, []),
        ({"a": {"b", "c"}, "b": {"c"}, "c": {"outside"}}, []),
        ({"a": {"a"}}, ["a", "a"]),
        ({"a": {"b"}, "b": {"a"}}, ["a", "b", "a"]),
        ({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"e"}, "e": {"b"}}, ["b", "d", "e", "b"]),
    ],
)
def test_circle__finds_a_planted_one(graph: Mapping[str, set[str]], found: list[str]) -> None:
    assert circle(graph) == found


def test_imports__leaves_out_what_is_imported_for_types_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "module.py"
    file.write_text("if TYPE_CHECKING:\n    import a\nelse:\n    import b\n\ndef f():\n    from c import d\n")
    monkeypatch.setattr("tests.test_imports.ROOT", tmp_path)
    assert imports(file, types=False) == {"c", "c.d", "b"}
    assert imports(file) == {"a", "b", "c", "c.d"}


def test_imports__run_in_no_circle() -> None:
    """Lazy imports count: one inside a function hides a circle and does not undo it."""
    graph = {module_name(file): imports(file, types=False) & MODULES for file in FILES}
    assert "pecobook.data.folders" in graph["pecobook.data.images"]  # a lazy one, so lazy ones are seen
    assert circle(graph) == []


def loaded_by(module: str) -> set[str]:
    """Top-level packages in memory after importing `module` in a fresh process."""
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


SETTINGS = [module_name(file) for file in FILES if file.parent.name in ("settings", "recipes")]


@pytest.mark.parametrize("module", ["pecobook.cli", "pecobook", "pecobook.utils.output_folder", ", ".join(SETTINGS)])
def test_imports__what_is_quick_to_refuse_does_without_torch(module: str) -> None:
    heavy = {"torch", "timm", "torchvision", "lightning_fabric", "datasets", "sklearn", "matplotlib", "pandas"}
    loaded = loaded_by(module)
    assert "pecobook" in loaded
    assert loaded & heavy == set()
