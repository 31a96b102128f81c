"""Evaluation counts every image once, returns rows in order, and gives equal results on one rank and on two."""

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
    """A stage that returns the numbers of its images as rows, and records the rows of `summarise`."""

    def __init__(self) -> None:
        super().__init__()
        self.summarised: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def forward(self, batch: Batch) -> StageOutput:
        assert not self.training
        assert not torch.is_grad_enabled()
        index = batch["index"]
        mean = mean_of_counted(index.double(), batch)
        return StageOutput(
            mean, {"twice": 2 * mean}, {"images": batch["image"]}, {"number": index, "pair": index[:, None] + 1}
        )

    def summarise(self, rows: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
        self.summarised = rows, reference
        return {"sum": float(rows["number"].sum())}


class Pairs(Names):
    """A stage with a metric that a batch of one image does not have."""

    def forward(self, batch: Batch) -> StageOutput:
        output = super().forward(batch)
        return output if len(batch["index"]) == 1 else output._replace(metrics={"pairs": output.metrics["twice"]})


def full_image(image: Tensor, _key: int) -> dict[str, Tensor]:
    return {"image": image}


def evaluate_squares(
    num_held_out: int, num_reference: int | None, bad: tuple[int, ...] = (), **more: Any
) -> tuple[Evaluation, Names]:
    model = more.pop("model", Names)().train()
    fabric = launch.start(TrainConfig(out="unused", precision="fp32", devices=str(more.pop("devices", 1))))
    settings: dict[str, Any] = {"num_images": 100, "batch_size": 2, "seed": 0, **more}
    held_out = Stream(squares(num_held_out, bad), full_image, 0)
    reference = None if num_reference is None else Stream(squares(num_reference, bad), full_image, 0)
    return evaluate(fabric, model, model, held_out, reference, **settings), model


def test_evaluate__counts_every_image_once_and_summarises_all_rows() -> None:
    result, model = evaluate_squares(6, 4, batch_size=4)  # the last batch has two images
    rows, reference = model.summarised
    assert sorted(rows["number"].tolist()) == list(range(6))
    assert torch.equal(rows["pair"][:, 0], rows["number"] + 1)
    assert sorted(reference["number"].tolist()) == list(range(4))
    assert result.metrics == pytest.approx({"evaluation/loss": 2.5, "evaluation/twice": 5.0, "evaluation/sum": 15.0})
    assert len(result.pictures["images"]) == 4


def test_evaluate__a_metric_is_the_mean_over_the_batches_that_have_it() -> None:
    metrics = evaluate_squares(5, None, model=Pairs, batch_size=4)[0].metrics  # the last batch is one image
    one_batch = evaluate_squares(5, None, model=Pairs, batch_size=4, num_images=4)[0].metrics
    assert metrics["evaluation/pairs"] == pytest.approx(one_batch["evaluation/pairs"])
    assert "evaluation/pairs" not in evaluate_squares(1, None, model=Pairs)[0].metrics


def test_evaluate__reads_no_more_than_num_images() -> None:
    _, model = evaluate_squares(60, None, num_images=8)
    assert len(model.summarised[0]["number"]) == 8
    assert model.summarised[1] == {}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_evaluate__names_an_unreadable_image_and_counts_the_next_image_once(batch_size: int) -> None:
    result, model = evaluate_squares(6, 3, bad=(1, 4), batch_size=batch_size)
    rows, reference = model.summarised
    assert sorted(rows["number"].tolist()) == [0, 2, 3, 5]
    assert sorted(reference["number"].tolist()) == [0, 2]
    assert result.metrics == pytest.approx({"evaluation/loss": 2.5, "evaluation/twice": 5.0, "evaluation/sum": 10.0})
    assert {name.partition(":")[0].partition(" (")[0] for name in result.skipped} == {"square 1", "square 4"}


def test_evaluate__returns_no_metrics_where_no_image_can_be_read() -> None:
    first = int(Stream(squares(6), full_image, 0)[0]["index"])
    result, model = evaluate_squares(6, None, bad=(first,), num_images=1)
    assert (result.metrics, result.rows, model.summarised) == ({}, {}, ({}, {}))
    assert len(result.skipped) == 1


def on_each(
    rank: int, world_size: int, bad: tuple[int, ...] = (), batch_size: int = 1
) -> tuple[dict[str, float], list[int], list[int]]:
    result, model = evaluate_squares(8 - len(bad) // 2, 6, bad, devices=world_size, batch_size=batch_size)
    rows, reference = model.summarised
    return result.metrics, rows["number"].tolist(), reference["number"].tolist()


def test_evaluate__two_processes_gather_the_rows_of_both(two_processes: TwoProcesses) -> None:
    (metrics, rows, reference), rank_1 = two_processes.run(on_each)
    assert (metrics, rows, reference) == rank_1
    alone, model = evaluate_squares(8, 6, batch_size=2)
    assert rows == model.summarised[0]["number"].tolist()
    assert reference == model.summarised[1]["number"].tolist()
    assert metrics == pytest.approx(alone.metrics)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluate__two_processes_count_each_readable_image_once(batch_size: int, two_processes: TwoProcesses) -> None:
    bad = (0, 2, 5)  # three of seven images, which two processes cannot share evenly
    (metrics, rows, reference), rank_1 = two_processes.run(on_each, bad, batch_size)
    assert (metrics, rows, reference) == rank_1
    assert sorted(rows) == [1, 3, 4, 6]
    assert metrics == pytest.approx({"evaluation/loss": 3.5, "evaluation/twice": 7.0, "evaluation/sum": 14.0})


def test_contrast__knn_accuracy_equals_that_of_the_exported_features(images: Path, tmp_path: Path) -> None:
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
    train_features, held_features = (
        backbone_features(backbone, to_float(images_of_split))["output"] for images_of_split in (pixels, held_pixels)
    )
    expected = knn_probe(train_features, labels, held_features, held_labels).accuracy
    assert logged(run)[-1]["evaluation/knn"] == pytest.approx(expected)
    assert expected > 0  # the three classes differ in colour


def test_contrast__logs_no_knn_accuracy_with_knn_images_0(images: Path, tmp_path: Path) -> None:
    from tests.runs import logged, train

    run = train("contrast", images, tmp_path / "run", knn_images=0)
    assert "evaluation/loss" in logged(run)[-1]
    assert "evaluation/knn" not in logged(run)[-1]
