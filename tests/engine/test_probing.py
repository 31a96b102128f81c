"""`--probe-data`: values of the very weights, equal after a resume and on two ranks, without an effect on weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pecobook.analysis.probe import knn_probe, linear_probe
from pecobook.analysis.rank import effective_rank
from pecobook.data.images import open_images
from pecobook.data.stream import read_all
from pecobook.engine import checkpoint, probing
from pecobook.engine.probing import interval
from pecobook.errors import PecobookError
from pecobook.models.weights import load_backbone
from tests.distributed import TwoProcesses
from tests.runs import export_bytes, logged, losses, train


def probed(run: Path) -> dict[int, dict[str, float]]:
    """Return the values of every probe by step."""
    lines = {line["step"]: {n: v for n, v in line.items() if n.startswith("probe/")} for line in logged(run)}
    return {step: values for step, values in lines.items() if values}


@pytest.mark.parametrize("command", ["contrast", "pretrain"])
def test_probe__changes_no_weight_and_a_resumed_run_logs_the_same(
    command: str, images: Path, needs: dict[str, str], tmp_path: Path
) -> None:
    more: dict[str, Any] = {**needs, "save_every": 4, "log_every": 4}
    plain = train(command, images, tmp_path / "plain", **more)
    more |= {"probe_data": str(images), "probe_every": 3}
    run = train(command, images, tmp_path / "run", **more)
    assert export_bytes(run)["model.safetensors"] == export_bytes(plain)["model.safetensors"]
    assert [line["loss"] for line in logged(run) if line["step"] in (4, 8)] == losses(plain)
    values = probed(run)
    assert list(values) == [3, 6, 8]
    assert all(line.keys() == {"probe/knn", "probe/linear", "probe/rank"} for line in values.values())
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped)
    checkpoint.delete_after(stopped / "checkpoints", 4)
    train(command, images, stopped, **more, resume=True)
    assert probed(stopped) == values


def test_probe__measures_the_weights_of_the_step(images: Path, tmp_path: Path) -> None:
    """Its last values are those of the exported network on all images of the source."""
    run = train("contrast", images, tmp_path / "run", max_steps="3", probe_data=str(images), probe_every=2)
    network, splits = load_backbone(str(run)).eval(), open_images(str(images))
    parts = []
    for source in (splits.train, splits.evaluation):
        pictures, labels, _ = read_all(source, 32)
        with torch.no_grad():
            parts += [network(pictures.float() / 255), labels]
    values = probed(run)[3]
    assert values["probe/rank"] == pytest.approx(effective_rank(parts[0]), rel=1e-4)
    assert values["probe/knn"] == pytest.approx(knn_probe(*parts).accuracy)
    assert values["probe/linear"] == pytest.approx(linear_probe(*parts).accuracy, abs=8)  # the order of images counts


def test_probe__without_labels_has_the_rank_alone(images: Path, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for number, file in enumerate(sorted(images.rglob("*.png"))[:24]):
        shutil.copy(file, tmp_path / "flat" / f"{number}.png")
    run = train("contrast", images, tmp_path / "run", max_steps="2", probe_data=str(tmp_path / "flat"), probe_every=1)
    assert [line.keys() for line in probed(run).values()] == [{"probe/rank"}, {"probe/rank"}]
    assert "rank alone, without labels" in (run / "train.log").read_text()


def test_interval__keeps_probes_below_two_percent() -> None:
    assert interval(cost=3.0, step_time=0.5, log_every=10) == 400  # 3 s of 200 s
    assert interval(cost=0.0, step_time=0.5, log_every=10) == 10


def test_probe__chooses_its_interval_once(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interval is recorded, so that a resumed run probes at the same steps on a machine of another speed."""
    more: dict[str, Any] = {"probe_data": str(images), "max_steps": "36", "save_every": 24}
    monkeypatch.setattr(probing, "interval", lambda *_: 7)
    run = train("contrast", images, tmp_path / "run", **more)
    values = probed(run)
    assert list(values) == [20, 21, 28, 35, 36]
    assert values[20]["probe/every"] == 7
    checkpoint.delete_after(run / "checkpoints", 24)
    monkeypatch.setattr(probing, "interval", lambda *_: 5)
    train("contrast", images, run, **more, resume=True)
    assert probed(run) == values


def test_probe__an_unusable_source_is_refused_by_its_flag(images: Path, tmp_path: Path) -> None:
    with pytest.raises(PecobookError, match=r"--probe-data: .*nowhere"):
        train("contrast", images, tmp_path / "run", probe_data=str(tmp_path / "nowhere"))
    assert not (tmp_path / "run").exists()


def train_on_each(rank: int, world_size: int, data: str, tokenizer: str, out: str, more: dict[str, Any]) -> None:
    train("pretrain", data, Path(out), tokenizer=tokenizer, **more)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_probe__two_processes_measure_what_one_measures(
    strategy: str, images: Path, codebook_run: Path, tmp_path: Path, two_processes: TwoProcesses
) -> None:
    """17 images do not divide by two: each counts once."""
    more: dict[str, Any] = {"max_steps": "2", "drop_path": 0.0, "optim.lr": 1e-30, "probe_data": str(images)}
    more |= {"probe_every": 1, "probe_images": 17}
    alone = train("pretrain", images, tmp_path / "one", tokenizer=str(codebook_run), **more)
    more |= {"devices": "2", "strategy": strategy}
    two_processes.run(train_on_each, str(images), str(codebook_run), str(tmp_path / "two"), more)
    first, second = probed(alone), probed(tmp_path / "two")
    assert first.keys() == second.keys() == {1, 2}
    for step, values in first.items():
        assert second[step] == pytest.approx(values, rel=1e-3)


def test_probe__may_change_on_resume(images: Path, tmp_path: Path) -> None:
    run = train("contrast", images, tmp_path / "run", max_steps="2", save_every=1)
    checkpoint.delete_after(run / "checkpoints", 1)
    train("contrast", images, run, max_steps="2", save_every=1, probe_data=str(images), resume=True)
    assert list(probed(run)) == [2]
    assert json.loads((run / "config.json").read_text())["probe_data"] == ""  # the settings with which it began
