"""`--dry-run` says what a run learns from and costs, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pecobook import api
from pecobook.data.stream import Stream
from pecobook.engine.dry_run import Measured, _cost_text, _memory_text, measure, seconds_text, size_text
from pecobook.engine.stage import Stage, StageOutput
from pecobook.errors import PreflightError
from pecobook.recipes import RECIPES, recipe
from pecobook.settings.contrast import ContrastConfig
from pecobook.settings.training import TrainConfig
from pecobook.settings.values import load, replace, to_dict
from tests.runs import SMALL, squares


def tree(*folders: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of the last change of every file and folder."""
    paths = [path for folder in folders for path in [folder, *folder.rglob("*")]]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize("command", list(RECIPES))
def test_dry_run__writes_nothing_and_prints_settings_that_can_be_run(
    command: str,
    images: Path,
    codebook_run: Path,
    needs: dict[str, str],
    vit_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    settings = {**SMALL[command], "data": str(images), **needs, "out": "runs/new"}
    folders = (tmp_path, images, codebook_run, vit_run, Path(settings["data"]))
    before = tree(*folders)
    getattr(api, command)("tiny", **settings, dry_run=True)
    assert tree(*folders) == before
    out, err = capsys.readouterr()

    printed = json.loads(out)
    resolved = replace(recipe(command, "tiny"), settings)
    assert printed == {"command": command, "recipe": "tiny", **to_dict(resolved)}
    (tmp_path / "config.json").write_text(out)
    assert load(recipe(command, "paper"), tmp_path / "config.json", command) == resolved
    topics = [line.split()[0] for line in err.splitlines()]
    for topic in ("data", "images", "classes", "sizes", "model", "device", "steps", "memory", "cost"):
        assert topic in topics, topic
    assert err.splitlines()[-1].endswith("trains and writes to runs/new.")


def test_dry_run__needs_no_folder_but_reports_one_that_is_not_empty(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    api.contrast("tiny", data=str(images), dry_run=True, **SMALL["contrast"])
    assert "Nothing was written." in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(PreflightError, match="is not empty"):
        api.contrast("tiny", data=str(images), out=str(tmp_path / "full"), dry_run=True, **SMALL["contrast"])


@pytest.mark.gpu
def test_dry_run__states_the_measured_peak_of_a_gpu(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    api.contrast("tiny", data=str(images), dry_run=True, **{**SMALL["contrast"], "precision": "bf16"})
    assert "; measured peak with 8 images: " in capsys.readouterr().err


class Linear(Stage[TrainConfig]):
    """A stage whose memory can be counted by hand: 192 inputs (float32) and 10 logarithms of an image are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(192, 10, bias=False)
        self.register_buffer("table", torch.zeros(7))

    def forward(self, batch: dict[str, Tensor]) -> StageOutput:  # type: ignore[override]
        return StageOutput(self.layer(batch["image"].float().flatten(1)).exp().sum(), {})


def test_measure__counts_the_bytes_of_weights_gradients_optimizer_and_activations() -> None:
    config = ContrastConfig(batch_size=32, micro_batch_size=16, precision="fp32", workers=0, max_steps="5")
    config = replace(config, {"optim.name": "adamw"})
    stream = Stream(squares(40), lambda image, _key: {"image": image}, 0)
    measured = measure(Linear(), stream, config)
    weights = 192 * 10 * 4
    assert measured.weights == weights + 7 * 4
    assert measured.gradients == weights
    assert measured.optimizer - 2 * weights in (0, 4)  # two moments, and the number of steps
    assert measured.activations == 16 * (192 + 10) * 4
    assert measured.images == 16
    assert measured.peak == 0
    assert min(measured.read, measured.compute, measured.update) > 0


def test_texts__scale_the_measured_part_to_a_whole_run() -> None:
    config = ContrastConfig(batch_size=32, micro_batch_size=16, workers=0, max_steps="100", devices="1")
    measured = Measured(8, 0.001, 0.02, 0.1, 40_000_000, 20_000_000, 40_000_000, 1_000_000_000, 0)
    memory = "about 1.1 GB: weights 40 MB, gradients 20 MB, optimizer 40 MB, activations 1 GB of 16 images at once"
    assert _memory_text(measured, config, 2_000_000_000) == memory
    few = ". There are 600 MB here: give --micro-batch-size 8"  # 62.5 MB an image, beside 100 MB
    assert _memory_text(measured, config, 600_000_000) == memory + few
    assert _memory_text(measured, config, 120_000_000) == f"{memory}. There are 120 MB here: it does not fit"
    assert _cost_text(measured, config, 1000) == (
        "about 772 ms a step, 1m17s in all, evaluations not counted; measured on 8 images: 20 ms each, 1 ms to read one"
    )
    slow = measured._replace(read=0.1)
    text = _cost_text(slow, replace(config, {"workers": 2}), 1000)
    assert text.startswith("about 1.6 s a step, 2m40s in all")
    assert text.endswith("so reading sets the pace")


@pytest.mark.parametrize(("size", "text"), [(7680, "7.68 kB"), (12_345_678, "12.3 MB"), (999_900_000, "1000 MB")])
def test_size_text(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0034, "3.4 ms"), (0.12, "120 ms"), (2.54, "2.5 s"), (33.3, "33 s"), (200, "3m20s")]
)
def test_seconds_text(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text
