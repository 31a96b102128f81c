"""The training loop in two processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pecobook.data.batch import Batch
from pecobook.engine.stage import StageOutput
from tests.distributed import TwoProcesses
from tests.engine.test_loop import Toy, first_image_of, run
from tests.runs import logged


def train_half(rank: int, world_size: int, out: str, resume: bool, bad: tuple[int, ...]) -> Any:
    stage = Toy()
    outcome = run(Path(out), stage, bad=bad, devices="2", resume=resume, max_steps="6", save_every=3)
    return stage.seen, stage.linear.weight.flatten().tolist(), outcome.metrics


def test_fit__two_processes_equal_one(tmp_path: Path, two_processes: TwoProcesses) -> None:
    alone = Toy()
    run(tmp_path / "one", alone)
    first, second = two_processes.run(train_half, str(tmp_path / "two"), False, ())
    assert [a + b for a, b in zip(first[0], second[0], strict=True)] == alone.seen
    assert first[1] == second[1]
    assert first[1] == pytest.approx(alone.linear.weight.flatten().tolist(), rel=1e-5)
    assert first[2] == second[2]
    for a, b in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        for name in ("step", "loss", "mean_index", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)


class Counting(Toy):
    """Its loss and metric are means over images whose number is no multiple of three."""

    def forward(self, batch: Batch) -> StageOutput:
        counted = batch["index"] % 3 != 0
        error = (self.linear(batch["image"].float().mean((2, 3)) / 255)[:, 0] - batch["index"] / 10).square()
        total = counted.sum().clamp_min(1)
        mean_index = (batch["index"] * counted).sum() / total
        return StageOutput((error * counted).sum() / total, {"mean_index": mean_index})

    def loss_count(self, batch: Batch) -> Tensor:
        return (batch["index"] % 3 != 0).sum()


def train_counting(rank: int, world_size: int, out: str, more: dict[str, Any]) -> list[float]:
    stage = Counting()
    run(Path(out), stage, devices=str(world_size), **more)
    weights: list[float] = stage.linear.weight.flatten().tolist()
    return weights


@pytest.mark.parametrize("processes", [1, 2])
def test_fit__a_mean_over_counted_things_is_the_mean_over_the_whole_step(
    tmp_path: Path, processes: int, two_processes: TwoProcesses
) -> None:
    weights = train_counting(0, 1, str(tmp_path / "whole"), {})
    more = {"micro_batch_size": 1}
    if processes == 1:
        parts = train_counting(0, 1, str(tmp_path / "parts"), more)
    else:
        parts = two_processes.run(train_counting, str(tmp_path / "parts"), more)[0]
    assert parts == pytest.approx(weights, rel=1e-5)
    for a, b in zip(logged(tmp_path / "whole"), logged(tmp_path / "parts"), strict=True):
        for name in a.keys() & {"loss", "mean_index", "grad_norm"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


def test_fit__lists_the_images_that_either_process_skipped(tmp_path: Path, two_processes: TwoProcesses) -> None:
    bad = (first_image_of(0, position=0), first_image_of(1, position=3))
    two_processes.run(train_half, str(tmp_path), False, bad)
    log = (tmp_path / "train.log").read_text()
    assert {
        line.partition("skipped: ")[2].split(" (")[0].split(":")[0] for line in log.splitlines() if "skipped: " in line
    } == {f"square {index}" for index in bad}


def test_fit__resumes_on_another_number_of_processes(tmp_path: Path, two_processes: TwoProcesses) -> None:
    straight, part, rest = Toy(), Toy("SIGTERM", at=first_image_of(2)), Toy()
    run(tmp_path / "straight", straight)
    assert run(tmp_path / "run", part).step == 3
    first, second = two_processes.run(train_half, str(tmp_path / "run"), True, ())
    assert [a + b for a, b in zip(first[0], second[0], strict=True)] == straight.seen[3:]
    assert first[1] == pytest.approx(straight.linear.weight.flatten().tolist(), rel=1e-5)
    # The other direction: two processes stop half way (checkpoint of step 3), and one process resumes.
    two_processes.run(train_half, str(tmp_path / "back"), False, ())
    shutil.rmtree(tmp_path / "back" / "checkpoints" / "step-00000006")
    assert run(tmp_path / "back", rest, resume=True).finished
    assert rest.seen == straight.seen[3:]
    torch.testing.assert_close(rest.linear.weight, straight.linear.weight, rtol=1e-5, atol=1e-6)
