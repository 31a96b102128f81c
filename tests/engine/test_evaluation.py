"""Evaluation: every image once, rows in order, the same on one rank as on two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pecobook.data.batch import Batch
from pecobook.data.stream import Stream
from pecobook.engine import launch
from pecobook.engine.evaluation import Evaluation, evaluate
from pecobook.engine.stage import StageOutput, mean_of_counted
from pecobook.settings.training import TrainConfig
from tests.distributed import TwoProcesses
from tests.runs import squares


class Names(nn.Module):
    """Returns the numbers of its images as rows, and remembers what it was asked to sum up."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def forward(self, batch: Batch) -> StageOutput:
        assert not self.training
        assert not torch.is_grad_enabled()
        index = batch["index"]
        mean = mean_of_counted(index.double(), batch)
        return StageOutput(
            mean, {"twice": 2 * mean}, {"images": batch["image"]}, {"number": index, "pair": index[:, None] + 1}
        )

    def summarise(self, rows: dict[str, Tensor], known: dict[str, Tensor]) -> dict[str, float]:
        self.asked = rows, known
        return {"sum": float(rows["number"].sum())}


def whole(image: Tensor, _key: int) -> dict[str, Tensor]:
    return {"image": image}


def look(held_out: int, known: int | None, bad: tuple[int, ...] = (), **more: Any) -> tuple[Evaluation, Names]:
    model = Names().train()
    fabric = launch.start(TrainConfig(out="unused", precision="fp32", devices=str(more.pop("devices", 1))))
    settings: dict[str, Any] = {"num_images": 100, "batch_size": 2, "seed": 0, **more}
    reference = None if known is None else Stream(squares(known, bad), whole, 0)
    found = evaluate(fabric, model, model, Stream(squares(held_out, bad), whole, 0), reference, **settings)
    return found, model


def test_evaluate__sees_every_image_once_and_sums_up_all_rows() -> None:
    found, model = look(6, 4, batch_size=4)  # the last batch is a half one
    rows, known = model.asked
    assert sorted(rows["number"].tolist()) == list(range(6))
    assert torch.equal(rows["pair"][:, 0], rows["number"] + 1)
    assert sorted(known["number"].tolist()) == list(range(4))
    assert found.metrics == pytest.approx({"evaluation/loss": 2.5, "evaluation/twice": 5.0, "evaluation/sum": 15.0})
    assert len(found.pictures["images"]) == 4


def test_evaluate__looks_at_no_more_than_asked() -> None:
    _, model = look(60, None, num_images=8)
    assert len(model.asked[0]["number"]) == 8
    assert model.asked[1] == {}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_evaluate__an_image_that_cannot_be_read_is_named_and_the_next_counts_once(batch_size: int) -> None:
    found, model = look(6, 3, bad=(1, 4), batch_size=batch_size)
    rows, known = model.asked
    assert sorted(rows["number"].tolist()) == [0, 2, 3, 5]
    assert sorted(known["number"].tolist()) == [0, 2]
    assert found.metrics == pytest.approx({"evaluation/loss": 2.5, "evaluation/twice": 5.0, "evaluation/sum": 10.0})
    assert {name.partition(":")[0].partition(" (")[0] for name in found.skipped} == {"square 1", "square 4"}


def test_evaluate__of_nothing_that_can_be_read_tells_nothing() -> None:
    first = int(Stream(squares(6), whole, 0)[0]["index"])
    found, model = look(6, None, bad=(first,), num_images=1)
    assert (found.metrics, found.rows, model.asked) == ({}, {}, ({}, {}))
    assert len(found.skipped) == 1


def on_each(
    rank: int, world_size: int, bad: tuple[int, ...] = (), batch_size: int = 1
) -> tuple[dict[str, float], list[int], list[int]]:
    found, model = look(8 - len(bad) // 2, 6, bad, devices=world_size, batch_size=batch_size)
    rows, known = model.asked
    return found.metrics, rows["number"].tolist(), known["number"].tolist()


def test_evaluate__two_processes_gather_the_rows_of_both(two_processes: TwoProcesses) -> None:
    (left, rows, known), right = two_processes.run(on_each)
    assert (left, rows, known) == right
    alone, model = look(8, 6, batch_size=2)
    assert rows == model.asked[0]["number"].tolist()
    assert known == model.asked[1]["number"].tolist()
    assert left == pytest.approx(alone.metrics)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluate__two_processes_count_what_can_be_read_once(batch_size: int, two_processes: TwoProcesses) -> None:
    bad = (0, 2, 5)  # of seven, which two processes cannot share evenly
    (left, rows, known), right = two_processes.run(on_each, bad, batch_size)
    assert (left, rows, known) == right
    assert sorted(rows) == [1, 3, 4, 6]
    assert left == pytest.approx({"evaluation/loss": 3.5, "evaluation/twice": 7.0, "evaluation/sum": 14.0})


def test_contrast__knn_accuracy_is_that_of_its_exported_features(images: Path, tmp_path: Path) -> None:
    from pecobook.analysis.features import backbone_features
    from pecobook.analysis.probe import knn_probe
    from pecobook.data.images import open_images
    from pecobook.data.sampler import key, permute
    from pecobook.data.stream import read_all
    from pecobook.models.weights import load_backbone
    from pecobook.utils.images import to_float
    from tests.runs import logged, train

    run = train("contrast", images, tmp_path / "run", knn_images=15, micro_batch_size=4)
    splits, backbone = open_images(str(images)), load_backbone(str(run))
    chosen = splits.train.subset(permute(i, len(splits.train), key(0, 1)) for i in range(15))
    assert len(splits.train) > 15
    pixels, labels, _ = read_all(chosen, 32)
    held_pixels, held_labels, _ = read_all(splits.evaluation, 32)
    assert labels is not None
    assert held_labels is not None
    known, held = (backbone_features(backbone, to_float(part))["output"] for part in (pixels, held_pixels))
    expected = knn_probe(known, labels, held, held_labels).accuracy
    assert logged(run)[-1]["evaluation/knn"] == pytest.approx(expected)
    assert expected > 0  # the three classes differ in colour


def test_contrast__without_labels_or_wish_there_is_no_knn(images: Path, tmp_path: Path) -> None:
    from tests.runs import logged, train

    run = train("contrast", images, tmp_path / "run", knn_images=0)
    assert "evaluation/loss" in logged(run)[-1]
    assert "evaluation/knn" not in logged(run)[-1]
