"""README, quick start, tutorials and notebooks run: shortened in `make test`, as they stand among the slow tests."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pecobook import cli
from tests.runs import losses
from tests.walks import DOCS, ROOT, Walk, blocks, commands

TUTORIALS = DOCS / "tutorials"
QUICK_AND_FULL = pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def _in_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@QUICK_AND_FULL
def test_readme_quick_start_and_codebook_tutorial__run(quick: bool) -> None:
    """The three share their first trainings, as their readers do."""
    walk = Walk(quick=quick)
    names = walk.page(ROOT / "README.md")
    assert [tuple(names[name].shape) for name in ("codes", "again")] == [(2, 4, 4), (2, 3, 32, 32)]
    names = walk.page(DOCS / "quickstart.md")
    assert [tuple(names[name].shape) for name in ("codes", "features")] == [(2, 4, 4), (2, 128)]
    shared = {*commands(ROOT / "README.md")} & {*commands(DOCS / "quickstart.md")}
    assert len(shared) >= 4

    names = walk.page(TUTORIALS / "codebook.md")
    assert tuple(names["codes"].shape) == (1, 4, 4)
    assert Path("codeword.png").is_file()
    assert Path("runs/curves/report.html").is_file()
    if not quick:
        assert Path("runs/analysis/report.html").is_file()
        figures = json.loads(Path("runs/three/analysis.json").read_text())["tokenizers"]
        assert [tokenizer["name"] for tokenizer in figures] == ["codebook", "pixel", "control"]
    evaluated = json.loads(Path("runs/evaluation/evaluation.json").read_text())["tokenizers"]
    assert all(row["psnr"] > 0 and row["codes_used"] > 0 for row in evaluated)


@QUICK_AND_FULL
def test_backbone_tutorial__runs_on_a_mixed_folder(quick: bool, capsys: pytest.CaptureFixture[str]) -> None:
    walk = Walk(quick=quick)
    names = walk.page(TUTORIALS / "backbone.md")
    assert walk.ran["pecobook check --data pictures"] == 1
    printed = "".join(capsys.readouterr())
    for line in ("left out   1: 1 extension .txt", "- Training images that cannot be read: 1"):  # as the page says
        assert line in printed
        assert line in (TUTORIALS / "backbone.md").read_text()
    assert len(names["names"]) == 120  # without the broken one
    assert names["image"].shape == (1, 3, 32, 32)
    assert "torch.Size([1, 128])" in printed

    guide = walk.page(DOCS / "embed.md", ("python",))  # which reads features.parquet, too
    assert guide["neighbours"].shape == (len(guide["vectors"]), 6)
    assert len(guide["scores"]) == len(guide["names"]) == len(names["names"])


@QUICK_AND_FULL
def test_dense_tutorial__runs_on_tiffs_with_16_bits(quick: bool, capsys: pytest.CaptureFixture[str]) -> None:
    walk = Walk(quick=quick)
    names = walk.page(TUTORIALS / "dense.md")
    assert set(walk.ran.values()) == {0}
    assert "0..4095 becomes 0..255" in "".join(capsys.readouterr())
    assert len(names["scores"]) == 24
    assert json.loads(Path("runs/segmenter/config.json").read_text())["value_range"] == [0, 4095]
    assert len([*Path("found/masks/masks").iterdir()]) == 24
    assert Path("found/boxes/detections.json").is_file()
    if not quick:
        scratched = np.array([int(Path(name).stem) >= 148 for name in names["names"][~names["good"]]])
        assert names["scores"][scratched].mean() > names["scores"][~scratched].mean()


def _scripts() -> list[str]:
    return [text for language, text in blocks(TUTORIALS / "cluster.md") if language == "bash"]


def test_cluster_tutorial__scripts_can_be_parsed_and_the_run_goes_on() -> None:
    for script in _scripts():
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        (line,) = re.findall(r"pecobook (.*)", re.sub(r"\$SLURM_\w+", "3", script.replace("\\\n", " ")))
        command, *words = shlex.split(line)
        config = cli._settings(command, words)
        assert getattr(config, "resume", "") == "auto" or config.shard == "3/3"
    (line,) = commands(TUTORIALS / "cluster.md")
    walk = Walk(quick=True)
    walk.page(TUTORIALS / "cluster.md")
    before = Path("runs/one/metrics.jsonl").read_bytes()
    walk.ran.clear()
    walk.page(TUTORIALS / "cluster.md")
    assert Path("runs/one/metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_cluster_tutorial__two_processes_take_the_steps_of_one() -> None:
    (one,) = commands(TUTORIALS / "cluster.md")
    two = _scripts()[0]
    short = " --max-steps 3 --log-every 1 --precision fp32"
    python = Path(sys.executable).parent
    for command in (one.replace("pecobook", f"{sys.executable} -m pecobook", 1), f"{python}/{two.strip()}"):
        subprocess.run(command + short, shell=True, check=True)
    assert np.allclose(losses(Path("runs/one"))[:1], losses(Path("runs/two"))[:1], rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------- notebooks


def _cells(name: str) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads((DOCS / "notebooks" / name).read_text())["cells"]
    return cells


NOTEBOOKS = sorted(path.name for path in (DOCS / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks__hold_no_outputs_and_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of the cells with two steps, in this process; the slow test runs the notebook itself."""
    import matplotlib

    matplotlib.use("Agg")
    code = [cell for cell in _cells(name) if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    text = "\n".join("".join(cell["source"]) for cell in code)
    few = "max_steps=2, batch_size=8, evaluation_images=8, workers=0"
    few += ", knn_images=16" if name == "features.ipynb" else ""
    text, number = re.subn(r"max_steps=STEPS", few, text)
    assert number == 1
    names: dict[str, Any] = {}
    exec(compile(text, name, "exec"), names)
    if name == "codebook.ipynb":
        assert tuple(names["codes"].shape[1:]) == (4, 4)
        assert torch.isfinite(names["again"]).all()
    else:
        assert names["neighbours"].shape == (len(names["queries"]), 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks__run_in_jupyter(name: str, tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(DOCS / "notebooks" / name, as_version=4)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
