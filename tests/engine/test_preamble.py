"""What a run says before its first step, on the screen and in train.log."""

from __future__ import annotations

from pathlib import Path

import pytest

from pecobook import api
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
    assert shown[7].startswith("contrast 1/4  loss ")
    assert "left" not in shown[7]
    assert shown[8].startswith("contrast 2/4  loss ")
    assert "  left " in shown[8]
    logged = (tmp_path / "run" / "train.log").read_text()
    assert all(line in logged for line in shown[:7])


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
