"""What a run says before its first step, on the screen and in train.log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pecobook import api, cli
from pecobook.engine.preamble import compact, describe_run, device_name, parameter_counts
from pecobook.recipes import recipe
from pecobook.settings.values import replace
from tests.runs import SMALL


def test_run__says_what_it_learns_from_and_shows_its_first_steps(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**SMALL["contrast"], "log_every": 10, "max_steps": "4", "micro_batch_size": 4}
    api.contrast("tiny", data=str(images), out=str(tmp_path / "run"), **settings)
    shown = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in shown[:7]] == ["data", "images", "classes", "sizes", "model", "device", "steps"]
    assert shown[1].split(maxsplit=1)[1] == "22 images to train on, 2 held out (held-out 10% of train)"
    assert shown[2].split(maxsplit=1)[1] == "3 classes: blue 6, green 8, red 8; held out: blue 2, green 0, red 0"
    assert shown[3].split(maxsplit=1)[1] == "48 x 40 pixels; mode RGB"
    assert shown[6].split(maxsplit=1)[1] == "4 (1.5 epochs), 8 images a step (1 device, 4 images at once, 2 parts)"
    assert shown[7].split(maxsplit=1) == [
        "settings",
        "of the recipe tiny, but batch-size 8, blur [1.0, 0.1], hidden-dim 32, max-steps 4, "
        'model.args {"channels": [8, 16, 32, 64], "stem_width": 8}, output-dim 16',
    ]
    assert shown[8].startswith("contrast 1/4  loss ")
    assert "left" not in shown[8]
    assert shown[9].startswith("contrast 2/4  loss ")
    assert "  left " in shown[9]
    logged = (tmp_path / "run" / "train.log").read_text()
    assert all(line in logged for line in shown[:8])


def test_run__a_file_names_the_recipe_and_config_diff_the_changes(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of a few settings, with comments, is enough for a run; config.json of that run is enough for another."""
    file, run, again = tmp_path / "mine.yaml", tmp_path / "run", tmp_path / "again"
    small = {name: value for name, value in SMALL["contrast"].items() if name not in ("blur", "loggers")}
    lines = [f"{name}: {value}" if value != "fp32" else "precision: fp32  # a CPU" for name, value in small.items()]
    text = "\n".join(["recipe: tiny", *lines, "blur: [1.0, 0.1]", "max_steps: 1", f"data: {images}"])
    file.write_text(text.replace("model.args: ", "model.args: '").replace("8}", "8}'").replace("max_steps: 8\n", ""))
    cli.main(["contrast", "--config", str(file), "--out", str(run), "--optim.lr", "0.25"])
    shown = capsys.readouterr().err
    assert "settings" in shown
    changes = (run / "config.diff").read_text().splitlines()
    before = recipe("contrast", "tiny")
    assert changes[0] == "pecobook contrast tiny: settings that differ"
    assert f"optim.lr: {before.optim.lr} -> 0.25" in changes
    assert f"hidden-dim: {before.hidden_dim} -> 32" in changes
    assert not any(line.startswith(("log-every:", "workers:", "out:", "seed:")) for line in changes)
    settings = json.loads((run / "config.json").read_text())
    assert settings["recipe"] == "tiny"
    cli.main(["contrast", "--config", str(run), "--out", str(again)])
    assert (again / "config.diff").read_bytes() == (run / "config.diff").read_bytes()
    cli.main(["contrast", "--config", str(again), "--out", str(again), "--resume"])
    settings.pop("recipe")
    (run / "config.json").write_text(json.dumps(settings))  # as of an earlier version
    cli.main(["contrast", "--config", str(run), "--out", str(again), "--overwrite"])
    assert not (again / "config.diff").exists()
    assert "recipe" not in json.loads((again / "config.json").read_text())


def test_describe_run__counts_parameters_and_steps() -> None:
    from pecobook.stages.moco import MocoStage

    config = replace(recipe("contrast", "tiny"), {**SMALL["contrast"], "max_steps": "100 epochs", "precision": "fp32"})
    stage = MocoStage(config)
    count, trained = parameter_counts(stage)
    assert count == trained + sum(p.numel() for name, p in stage.named_parameters() if name.startswith("momentum_"))
    lines = dict(describe_run(stage, config, num_images=1000))
    assert lines["model"] == f"{compact(count)} parameters, {compact(trained)} of them trained"
    assert lines["steps"] == "12,500 (100 epochs), 8 images a step"
    assert lines["device"].endswith(", fp32")


def test_device_name__counts_processes_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 4)
    assert (device_name(), device_name(2)) == ("CPU, 4 threads", "2 processes on the CPU, 4 threads each")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    assert (device_name(), device_name(8)) == ("NVIDIA H200", "8 x NVIDIA H200")


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999"), (1234, "1.23k"), (12_345_678, "12.3M"), (999_900_000, "1000M"), (2.5e9, "2.5G")]
)
def test_compact__has_three_digits(number: float, text: str) -> None:
    assert compact(number) == text
