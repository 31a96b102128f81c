"""What is published: the files of the wheel, the version wherever it stands, the lowest versions, the Makefile."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_wheel__holds_the_package_and_all_it_reads_and_nothing_else() -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel")
    files = {file.distribution_path for file in wheel.WheelBuilder(str(ROOT)).recurse_included_files()}
    package = ROOT / "src" / "pecobook"
    expected = {path.relative_to(package.parent).as_posix() for path in package.rglob("*") if path.is_file()}
    assert files == {name for name in expected if "__pycache__" not in name}
    assert {"pecobook/py.typed", "pecobook/analysis/templates/report.html.j2"} <= files


def test_version__is_one_and_has_a_changelog() -> None:
    version = PROJECT["version"]
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    for file, pattern in (("CITATION.cff", r"^version: (\S+)$"), ("Dockerfile", r"^ARG VERSION=(\S+)$")):
        assert re.findall(pattern, (ROOT / file).read_text(), flags=re.MULTILINE) == [version]


def test_floors__name_every_dependency_once_with_its_lowest_version() -> None:
    lines = subprocess.check_output([sys.executable, ROOT / ".ci" / "floors"], text=True).splitlines()
    floors = dict(line.split("==") for line in lines)
    assert len(floors) == len(lines)
    assert floors["torch"] == "2.6"
    extras = {name: needs for name, needs in PROJECT["optional-dependencies"].items() if name not in ("dev", "test")}
    needs = {*PROJECT["dependencies"], *(need for needs in extras.values() for need in needs)}
    listed = {re.sub(r"\[.*?\]", "", need) for need in needs if not need.startswith("pecobook[")}
    assert listed == {line.replace("==", ">=") for line in lines}


def make(*words: str) -> str:
    """Return the commands that `make` would run in a checkout without an environment."""
    environment = {**os.environ, "MAKEFLAGS": "", "TORCH_INDEX": ""}
    command = ["make", "--dry-run", *words, f"VENV={ROOT / 'no-such-environment'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize(("target", "extra"), [("demo", "full"), ("test", "dev")])
def test_make__installs_pytorch_first_from_an_index_of_its_own(target: str, extra: str) -> None:
    installs = re.findall(r"pip install --disable-pip-version-check +(.*)", make(target, "TORCH_INDEX=ADDRESS"))
    own = f'--editable ".[{extra}]"'
    assert installs == ["torch torchvision", own]
    assert "PIP_INDEX_URL=ADDRESS " in next(
        line for line in make(target, "TORCH_INDEX=ADDRESS").splitlines() if "torchvision" in line
    )
    assert re.findall(r"pip install --disable-pip-version-check +(.*)", make(target)) == [own]


def test_python_versions__are_the_same_everywhere() -> None:
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()  # type: ignore[union-attr]
    versions = [f"3.{minor}" for minor in range(int(low), int(high))]
    named = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if "Python :: 3." in text]
    assert named == versions
    assert f"(3, {low}) <= v < (3, {high})" in (ROOT / "Makefile").read_text()
    assert f"Python {versions[0]} to {versions[-1]}" in (ROOT / "README.md").read_text()
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert {versions[0], versions[-1]} <= set(re.findall(r'"(3\.\d+)"', workflow))
