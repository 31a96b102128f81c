"""The loop with a stage of four weights, so that effects of the loop and of the stage can be distinguished."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pecobook.data.batch import Batch
from pecobook.data.stream import Stream
from pecobook.data.views import random_crop
from pecobook.engine import checkpoint, launch, loop, run_folder
from pecobook.engine.loop import Outcome
from pecobook.engine.stage import Stage, StageOutput
from pecobook.engine.world import is_leader
from pecobook.errors import NonFiniteLossError, PecobookError
from pecobook.settings.training import OptimConfig, TrainConfig
from tests.distributed import TwoProcesses
from tests.runs import logged, squares


class Toy(Stage[TrainConfig]):
    """A linear map from mean colour to the image's number; `failure` happens at image `at`."""

    def __init__(self, failure: str = "", at: int = -1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(3, 1)
        self.failure, self.at = failure, at
        self.seen: list[list[int]] = []
        self.noise: list[float] = []
        self.steps: list[tuple[int, int]] = []

    def forward(self, batch: Batch) -> StageOutput:
        images, index = batch["image"].float() / 255, batch["index"]  # (B, 3, 8, 8), (B,)
        error = (self.linear(images.mean((2, 3)))[:, 0] - index / 10).square().mean()
        metrics = {"mean_index": index.float().mean()}
        if not self.training:
            return StageOutput(error, metrics, {"images": images}, {"number": index, "colour": images.mean((2, 3))})
        self.seen.append(index.tolist())
        self.noise.append(torch.rand(()).item())
        if self.at in index.tolist():
            error = self.fail_with(error)
        return StageOutput(error, metrics)

    def fail_with(self, error: Tensor) -> Tensor:
        if self.failure == "nan":
            return error * float("nan")
        if self.failure == "gradient":  # the loss is finite, its gradient is not
            return error + (self.linear.weight * 0).abs().sqrt().sum()
        if self.failure == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        os.kill(os.getpid(), getattr(signal, self.failure))
        return error

    def after_step(self, step: int, total: int) -> None:
        self.steps.append((step, total))


def view(image: Tensor, key: int) -> dict[str, Tensor]:
    return {"image": random_crop(image, 8, key, min_area=0.5)}


def settings(out: Path, **more: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "precision": "fp32",
        "batch_size": 4,
        "max_steps": "6",
        "workers": 0,
        "log_every": 1,
        "sample_every": 3,
        "loggers": (),
        # With such a large epsilon Adam is linear in the gradient, so that rounding errors stay small.
        "optim": OptimConfig(lr=0.5, eps=10.0, weight_decay=0.0, warmup="0"),
    }
    return TrainConfig(out=str(out), **{**values, **more})


def run(out: Path, stage: Toy, *, bad: tuple[int, ...] = (), count: int = 20, **more: Any) -> Outcome:
    config = settings(out, **more)
    lock = run_folder.prepare(config, "toy") if is_leader() else None
    try:
        return loop.fit(
            launch.start(config),
            stage,
            Stream(squares(count, bad), view, config.seed),
            Stream(squares(5), view, 0),
            config=config,
            command="toy",
        )
    finally:
        if lock is not None:
            lock.release()


def first_image_of(step: int, *, batch_size: int = 4, position: int = 0) -> int:
    """Return the number of the image at a position of a step's batch, which follows from the order of images."""
    return int(Stream(squares(20), view, 0)[batch_size * step + position]["index"])


# ------------------------------------------------------------------------------------------------ runs without failure


def test_fit__runs_every_step_once_and_ends(tmp_path: Path) -> None:
    stage = Toy()
    outcome = run(tmp_path, stage)
    assert (outcome.step, outcome.finished) == (6, True)
    assert stage.steps == [(step, 6) for step in range(1, 7)]
    first_epoch = [index for batch in stage.seen[:5] for index in batch]
    assert sorted(first_epoch) == list(range(20))
    assert len(set(stage.noise)) == 6  # every step draws other random numbers
    assert checkpoint.steps(tmp_path / "checkpoints") == [6]


def test_fit__logs_each_step_in_one_line_with_all_metrics(tmp_path: Path) -> None:
    run(tmp_path, Toy(), log_every=2, sample_every=3)
    lines = logged(tmp_path)
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    trained = {"loss", "mean_index", "lr", "grad_norm", "images_per_second", "data_wait"}
    evaluated = {"evaluation/loss", "evaluation/mean_index"}
    assert [set(line) - {"step"} for line in lines] == [trained, evaluated, trained, trained | evaluated]


def test_fit__evaluation_averages_over_held_out_images(tmp_path: Path) -> None:
    stage = Toy()
    outcome = run(tmp_path, stage, micro_batch_size=1)
    assert outcome.metrics["evaluation/mean_index"] == pytest.approx(2.0)  # of 0 to 4
    source = squares(5)
    with torch.no_grad():
        colours = torch.stack([source.read(index)[:, 0, 0].float() / 255 for index in range(5)])
        expected = (stage.linear(colours)[:, 0] - torch.arange(5) / 10).square().mean()
    assert outcome.metrics["evaluation/loss"] == pytest.approx(float(expected), rel=1e-5)
    assert logged(tmp_path)[-1]["evaluation/loss"] == outcome.metrics["evaluation/loss"]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step-00000003.png", "step-00000006.png"]


def test_fit__logs_the_learning_rate_of_the_warmup(tmp_path: Path) -> None:
    run(tmp_path, Toy(), max_steps="4", optim=OptimConfig(lr=1.0, warmup="50%"))
    assert [line["lr"] for line in logged(tmp_path)] == pytest.approx([0.5, 1.0, 1.0, 0.5])


def test_fit__warns_once_of_a_warmup_longer_than_the_training(tmp_path: Path) -> None:
    run(tmp_path / "long", Toy(), max_steps="2 epochs", optim=OptimConfig(lr=1.0, warmup="4 epochs"))
    warning = (
        "The learning rate never reaches its peak: --optim.warmup 4 epochs takes 20 steps but the training 10, so it "
        "ends at 50% of the peak. Give a shorter warm-up (--optim.warmup 5%) or a longer training (--max-steps)."
    )
    assert (tmp_path / "long" / "train.log").read_text().count(warning) == 1
    assert logged(tmp_path / "long")[-1]["lr"] == pytest.approx(0.5)


@pytest.mark.parametrize(("kernel", "number"), [("triton", 1), ("sdpa", 0)])
def test_fit__says_once_that_a_kernel_of_ours_computes_nothing(
    kernel: str, number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, Toy(), attention=kernel)
    assert capsys.readouterr().err.count("--attention triton computes nothing here") == number


@pytest.mark.parametrize("micro", [1, 2])
def test_fit__accumulation_equals_the_full_batch(tmp_path: Path, micro: int) -> None:
    full, parts = Toy(), Toy()
    start = full.linear.weight.clone()
    run(tmp_path / "full", full)
    run(tmp_path / "parts", parts, micro_batch_size=micro)
    assert len(parts.seen) == 4 // micro * len(full.seen)
    assert [i for batch in parts.seen for i in batch] == [i for batch in full.seen for i in batch]
    assert (full.linear.weight - start).abs().max() > 1e-3
    torch.testing.assert_close(parts.linear.weight, full.linear.weight, rtol=1e-5, atol=1e-6)
    for a, b in zip(logged(tmp_path / "full"), logged(tmp_path / "parts"), strict=True):
        for name in ("loss", "mean_index", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4)


def test_fit__clips_the_whole_gradient(tmp_path: Path) -> None:
    free, clipped = Toy(), Toy()
    start = free.linear.weight.clone()
    more: dict[str, Any] = {"max_steps": "1", "betas": (0.0, 0.0)}
    optim = {"lr": 1.0, "eps": 1000.0, "weight_decay": 0.0, "warmup": "0", "betas": (0.0, 0.0)}
    run(tmp_path / "free", free, max_steps=more["max_steps"], optim=OptimConfig(**optim))  # type: ignore[arg-type]
    norm = logged(tmp_path / "free")[0]["grad_norm"]
    limit = OptimConfig(**optim, clip_grad=norm / 4)  # type: ignore[arg-type]
    run(tmp_path / "clipped", clipped, max_steps=more["max_steps"], optim=limit)
    assert logged(tmp_path / "clipped")[0]["grad_norm"] == pytest.approx(
        norm
    )  # the logged norm is measured before clipping
    torch.testing.assert_close(clipped.linear.weight - start, (free.linear.weight - start) / 4, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("workers", [1, 2])
def test_fit__order_and_metrics_do_not_depend_on_workers(tmp_path: Path, workers: int) -> None:
    alone, with_workers = Toy(), Toy()
    run(tmp_path / "alone", alone)
    run(tmp_path / "workers", with_workers, workers=workers)
    assert alone.seen == with_workers.seen
    assert torch.equal(alone.linear.weight, with_workers.linear.weight)
    names = ("step", "loss", "mean_index", "grad_norm", "lr")
    assert [[line[name] for name in names] for line in logged(tmp_path / "alone")] == [
        [line[name] for name in names] for line in logged(tmp_path / "workers")
    ]


def test_fit__skipped_images_are_counted_once_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = Toy()
    run(tmp_path, stage, bad=(3, 11), max_steps="15", workers=1)  # three epochs
    seen = [index for batch in stage.seen for index in batch]
    assert len(seen) == 60
    assert {3, 11}.isdisjoint(seen)
    log = (tmp_path / "train.log").read_text()
    assert log.count("skipped: ") == 2
    assert log.count("square 3") == log.count("square 11") == 1
    assert f"2 images could not be read; {tmp_path / 'train.log'} lists them." in capsys.readouterr().err


def test_fit__writes_checkpoints_when_due_and_keeps_the_last_k(tmp_path: Path) -> None:
    run(tmp_path, Toy(), save_every=2, max_steps="7", keep_checkpoints=3)
    assert checkpoint.steps(tmp_path / "checkpoints") == [4, 6, 7]


def test_fit__writes_a_checkpoint_after_some_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, Toy(), save_minutes=1e-9, log_every=2, keep_checkpoints=9)
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 4, 6]


def test_fit__prints_a_warning_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Toy, "warning", lambda *values: "It learns nothing." if values[2] > 2 else None)
    run(tmp_path, Toy())
    assert capsys.readouterr().err.count("It learns nothing.") == 1
    assert (tmp_path / "train.log").read_text().count("It learns nothing.") == 1


# ------------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize("failure", ["nan", "gradient"])
def test_fit__a_loss_or_gradient_that_is_not_finite_stops_before_the_optimizer(tmp_path: Path, failure: str) -> None:
    before, stage = Toy(), Toy(failure, at=first_image_of(2))
    run(tmp_path / "before", before, max_steps="2", optim=OptimConfig(lr=0.5, final_lr=0.5, warmup="0"))
    with pytest.raises(NonFiniteLossError) as caught:
        run(tmp_path / "run", stage, optim=OptimConfig(lr=0.5, final_lr=0.5, warmup="0"))
    assert "Step 3 is not finite" in str(caught.value)
    assert "--optim.lr" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 3
    assert stage.steps == [(1, 6), (2, 6)]
    assert torch.equal(stage.linear.weight, before.linear.weight)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == []


def fail_on_one(rank: int, world_size: int, out: str) -> tuple[str, list[float], int]:
    # Images 0 and 1 of a step are rank 0's, 2 and 3 rank 1's: the failure happens on rank 1 alone.
    stage = Toy("nan", at=first_image_of(2, position=3))
    try:
        run(Path(out), stage, devices="2")
    except NonFiniteLossError as error:
        return str(error), stage.linear.weight.flatten().tolist(), len(stage.steps)
    return "", [], len(stage.steps)


def test_fit__a_loss_that_is_not_finite_on_one_rank_stops_both(tmp_path: Path, two_processes: TwoProcesses) -> None:
    first, second = two_processes.run(fail_on_one, str(tmp_path))
    assert "Step 3 is not finite" in first[0]
    assert "loss nan" in second[0]
    assert "loss nan" not in first[0]
    assert first[1] == second[1] != []
    assert all(abs(weight) < 1e6 for weight in first[1])  # NaN would fail this
    assert first[2] == second[2] == 2


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_fit__saves_on_a_signal_and_resuming_equals_an_uninterrupted_run(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    straight, stage, again = Toy(), Toy(name, at=first_image_of(3)), Toy()
    run(tmp_path / "straight", straight)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    outcome = run(tmp_path / "run", stage)
    assert (outcome.step, outcome.finished) == (4, False)
    assert "Stopped at step 4; the checkpoint is written. Continue with --resume." in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4]
    assert run(tmp_path / "run", again, resume=True).finished
    assert again.steps == [(5, 6), (6, 6)]
    assert stage.seen + again.seen == straight.seen
    assert torch.equal(again.linear.weight, straight.linear.weight)
    assert [(line["step"], line["loss"]) for line in logged(tmp_path / "run")] == [
        (line["step"], line["loss"]) for line in logged(tmp_path / "straight")
    ]


def test_fit__a_second_signal_stops_at_once(tmp_path: Path) -> None:
    class Impatient(Toy):
        def fail_with(self, error: Tensor) -> Tensor:
            os.kill(os.getpid(), signal.SIGINT)
            return super().fail_with(error)

    stage = Impatient("SIGINT", at=first_image_of(1))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stage)
    assert stage.steps == [(1, 6)]


def test_fit__resumed_after_its_end_only_evaluates(tmp_path: Path) -> None:
    stage, again = Toy(), Toy()
    first = run(tmp_path, stage)
    lines = logged(tmp_path)
    second = run(tmp_path, again, resume=True)
    assert (second.step, second.finished, again.seen) == (6, True, [])
    assert second.metrics == first.metrics
    assert logged(tmp_path) == lines


def test_fit__a_failed_evaluation_loses_no_step_and_is_made_up_for_by_a_resume(tmp_path: Path) -> None:
    class Fails(Toy):
        def forward(self, batch: Batch) -> StageOutput:
            if not self.training:
                raise RuntimeError("evaluation")
            return super().forward(batch)

    straight, stage, again = Toy(), Fails(), Toy()
    run(tmp_path / "straight", straight)
    with pytest.raises(RuntimeError, match="evaluation"):
        run(tmp_path / "run", stage, save_every=3)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [3]
    with pytest.raises(RuntimeError, match="evaluation"):
        run(tmp_path / "run", Fails(), save_every=3, resume=True)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [3]
    assert run(tmp_path / "run", again, resume=True).finished
    assert torch.equal(again.linear.weight, straight.linear.weight)
    lines, expected = logged(tmp_path / "run"), logged(tmp_path / "straight")
    assert [(line["step"], line["loss"]) for line in lines] == [(line["step"], line["loss"]) for line in expected]
    for step in (2, 5):  # the evaluation of step 3 too, although the run had died in it
        assert lines[step]["evaluation/loss"] == expected[step]["evaluation/loss"]


def test_fit__reports_a_full_gpu_with_the_remedy(tmp_path: Path) -> None:
    stage = Toy("memory", at=first_image_of(0))
    with pytest.raises(PecobookError) as caught:
        run(tmp_path, stage)
    assert str(caught.value).splitlines()[0] == "Out of GPU memory with 4 images on a device."
    assert "--micro-batch-size 2" in str(caught.value)
