"""All ranks stop or fail together, at once or one step late."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pecobook.engine import checkpoint, loop
from pecobook.engine.finite_check import FiniteCheck
from pecobook.errors import NonFiniteLossError
from tests.distributed import TwoProcesses
from tests.engine.test_loop import Toy, first_image_of, run


def step_with(check: FiniteCheck, step: int, loss: float = 1.0, norm: float = 1.0, **more: bool) -> bool:
    flags = {"may_overflow": False, "stop": False, **more}
    return check.after_backward(step, torch.tensor(loss), torch.tensor(norm), **flags)


def test_at_once__stops_in_the_step_of_the_signal() -> None:
    check = FiniteCheck(1, late=False)
    assert [step_with(check, step, stop=step == 2) for step in (1, 2, 3)] == [False, True, False]
    assert check.wait() is False


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf")), (float("inf"), float("nan"))])
def test_at_once__raises_before_the_optimizer_step(loss: float, norm: float) -> None:
    check = FiniteCheck(1, late=False)
    step_with(check, 1)
    with pytest.raises(NonFiniteLossError, match=r"Step 2 is not finite .* the weights were not changed"):
        step_with(check, 2, loss, norm)


def test_fp16__accepts_an_infinite_gradient_but_no_infinite_loss() -> None:
    check = FiniteCheck(1, late=False)
    assert not step_with(check, 1, 1.0, float("inf"), may_overflow=True)
    with pytest.raises(NonFiniteLossError):
        step_with(check, 2, float("nan"), 1.0, may_overflow=True)


def test_late__stops_one_step_later_or_in_wait() -> None:
    check = FiniteCheck(1, late=True)
    assert [step_with(check, step, stop=step == 2) for step in (1, 2, 3)] == [False, False, True]
    step_with(check, 4, stop=True)
    assert check.wait() is True
    assert check.wait() is False


def test_late__raises_one_step_later_or_in_wait() -> None:
    check = FiniteCheck(1, late=True)
    step_with(check, 1)
    assert not step_with(check, 2, float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"Step 2 is not finite \(loss nan.* the last checkpoint is intact"):
        step_with(check, 3)
    check = FiniteCheck(1, late=True)
    step_with(check, 1, float("nan"))
    with pytest.raises(NonFiniteLossError, match="Step 1"):
        check.wait()


def on_each(rank: int, world_size: int, late: bool) -> tuple[list[bool], str]:
    check = FiniteCheck(world_size, late=late)
    stops = [step_with(check, step, stop=rank == 1 and step == 2) for step in (1, 2, 3)]
    try:
        step_with(check, 4, float("nan") if rank == 0 else 1.0)
        check.wait()
    except NonFiniteLossError as error:
        return stops, str(error).splitlines()[0]
    return stops, ""


@pytest.mark.parametrize("late", [False, True])
def test_two_processes__do_the_same(two_processes: TwoProcesses, late: bool) -> None:
    (stops_0, error_0), (stops_1, error_1) = two_processes.run(on_each, late)
    assert stops_0 == stops_1 == ([False, False, True] if late else [False, True, False])
    assert "Step 4 is not finite (loss nan" in error_0
    assert "Step 4 is not finite (loss 1" in error_1


@pytest.mark.gpu
def test_gpu__reads_the_answer_without_waiting_for_the_step() -> None:
    check, value = FiniteCheck(1, late=True), torch.ones((), device="cuda")

    def after_backward(step: int, loss: Tensor) -> bool:
        return check.after_backward(step, loss, value, may_overflow=False, stop=False)

    torch.cuda.set_sync_debug_mode("error")
    try:
        after_backward(1, value)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after_backward(2, value * float("nan"))
    with pytest.raises(NonFiniteLossError, match="Step 2"):
        after_backward(3, value)


def test_fit__saves_no_broken_weights_where_the_answer_is_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the next step has begun when the answer is read."""
    monkeypatch.setattr(loop, "FiniteCheck", lambda world_size, **_: FiniteCheck(world_size, late=True))
    stage = Toy("nan", at=first_image_of(3))
    with pytest.raises(NonFiniteLossError, match="Step 4 is not finite"):
        run(tmp_path, stage, save_every=2, log_every=100, sample_every=100)
    assert checkpoint.steps(tmp_path / "checkpoints") == [2]
    state = torch.load(tmp_path / "checkpoints" / "step-00000002" / "state.pt", weights_only=True)["model"]
    assert all(value.isfinite().all() for value in state.values())
    stopped = Toy("SIGTERM", at=first_image_of(2))
    outcome = run(tmp_path / "stopped", stopped, save_every=100, log_every=100, sample_every=100)
    # The signal came in the third step and was read in the fourth.
    assert (outcome.step, outcome.finished) == (4, False)
    assert checkpoint.steps(tmp_path / "stopped" / "checkpoints") == [4]
