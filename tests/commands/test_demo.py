"""The complete demo with few steps, and its plan."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from pecobook.commands.demo import demo
from pecobook.commands.demo.plan import plan
from pecobook.errors import PreflightError
from pecobook.settings.demo import DemoConfig
from pecobook.settings.values import to_dict
from pecobook.utils.files import write_json
from tests import forked


def test_plan__codebooks_differ_only_in_the_perceptual_network(tmp_path: Path) -> None:
    jobs = plan(DemoConfig(out=str(tmp_path), budget="cpu"))
    pixel, control, perceptual = (to_dict(jobs[f"codebook-{a}"].config) for a in ("pixel", "control", "perceptual"))
    for settings in (pixel, control, perceptual):
        settings.pop("out")
    assert control["perceptual"].pop("weights") == "random"
    assert perceptual["perceptual"].pop("weights") == ""
    assert control == perceptual
    assert pixel.pop("perceptual")["network"] == "none"
    perceptual.pop("perceptual")
    assert pixel == perceptual


@pytest.mark.parametrize("budget", ["cpu", "gpu"])
def test_plan__every_run_follows_the_runs_that_it_needs(tmp_path: Path, budget: str) -> None:
    earlier: set[str] = set()
    from pecobook.settings.values import replace

    for name, job in plan(replace(DemoConfig(out=str(tmp_path)), {"budget": budget, "length": 0.5})).items():
        assert set(job.needs) <= earlier
        earlier.add(name)
    assert len(earlier) == 6


def test_demo__writes_results_pictures_and_report(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = itertools.chain([subprocess.Popen], itertools.repeat(forked.Job))
    module = SimpleNamespace(Popen=lambda *words, **options: next(starts)(*words, **options), STDOUT=subprocess.STDOUT)
    monkeypatch.setattr("pecobook.commands.jobs.subprocess", module)
    out = tmp_path / "demo"
    config = DemoConfig(data=str(images), out=str(out), length=0.02, max_train=16, max_test=8, budget="cpu")
    report = demo(config)

    results = json.loads((out / "results.json").read_text())
    assert {"data", "seed", "seconds", "floor", "codebooks"} <= results.keys()
    assert results["floor"].keys() == {"linear", "knn"}
    assert [entry["name"] for entry in results["codebooks"]] == ["pixel", "control", "perceptual"]
    for entry in results["codebooks"]:
        assert 0 <= entry["position"]["null_share"] <= 1
        assert entry["position"]["moved"].keys() == {"roll", "crop"}
        assert {"codes_used", "perplexity", "psnr", "perceptual_distance", "codeword_probe", "mim"} <= entry.keys()
        assert 1 <= entry["perplexity"] <= entry["codes_used"] <= 512
        if entry["name"] == "control":
            assert entry["mim"] is None
        else:
            assert entry["mim"].keys() == {"loss", "accuracy", "accuracy_of_position", "linear", "knn"}
            assert all(0 <= entry["mim"][name] <= 100 for name in entry["mim"].keys() - {"loss"})
    pairs = {(c["metric"], c["a"], c["b"]) for c in results["comparisons"]}
    assert ("codeword_probe", "perceptual", "control") in pairs
    assert ("crossed_probe", "perceptual", "control") in pairs

    html = report.read_text()
    assert report == out / "report.html"
    assert not re.search(r"(src|href)=[\"']?https?://", html)
    assert html.count("data:image/png;base64") >= 6
    assert {path.stem for path in (out / "pictures").iterdir()} >= {"reconstructions", "gallery-control", "usage"}
    assert [entry["name"] for entry in results["masked_prediction"]] == ["pixel", "perceptual"]
    assert all(
        0 <= part["position_baseline"] <= 100 for run in results["masked_prediction"] for part in run["by_share"]
    )

    # Finished runs are not trained again: the second call only measures, with equal results.
    before = (out / "codebook-pixel" / "export" / "model.safetensors").stat().st_mtime_ns
    demo(config)
    again = json.loads((out / "results.json").read_text())
    assert (out / "codebook-pixel" / "export" / "model.safetensors").stat().st_mtime_ns == before
    assert {**again, "seconds": 0} == {**results, "seconds": 0}

    with pytest.raises(PreflightError, match="other settings"):
        demo(config, seed=1)


def test_demo__refuses_a_folder_without_a_demo(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(PreflightError, match="holds no demo"):
        demo(DemoConfig(out=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_demo__names_the_settings_that_differ_from_those_of_the_folder(tmp_path: Path) -> None:
    write_json(tmp_path / "demo.json", to_dict(DemoConfig(out=str(tmp_path), seed=1)))
    with pytest.raises(PreflightError, match=r"was begun with other settings: seed: 1 -> 0\. Name another folder"):
        demo(DemoConfig(out=str(tmp_path)))
