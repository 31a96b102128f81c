from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pecobook.engine import checkpoint
from pecobook.errors import RunFolderError
from pecobook.utils.checksums import checksum_file
from tests.distributed import TwoProcesses


def make(seed: int = 0, width: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    stage = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))
    decayed = {"params": [stage[0].weight], "weight_decay": 0.1, "lr_scale": 0.5}
    rest = {"params": [stage[0].bias, *stage[1].parameters()], "weight_decay": 0.0, "lr_scale": 1.0}
    return stage, torch.optim.AdamW([decayed, rest], lr=0.1)


def step(stage: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    stage(torch.randn(8, 4, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_save_load__training_continues_bit_for_bit(tmp_path: Path) -> None:
    stage, optimizer = make()
    for number in range(3):
        step(stage, optimizer, number)
    checkpoint.save(tmp_path, step=3, stage=stage, optimizer=optimizer, keep=2)
    loaded, loaded_optimizer = make(seed=9)
    assert checkpoint.load(tmp_path, stage=loaded, optimizer=loaded_optimizer) == 3
    assert [group["lr_scale"] for group in loaded_optimizer.param_groups] == [0.5, 1.0]
    assert [group["weight_decay"] for group in loaded_optimizer.param_groups] == [0.1, 0.0]
    for number in range(3, 6):
        step(stage, optimizer, number)
        step(loaded, loaded_optimizer, number)
    assert same(stage, loaded)


def test_load__returns_zero_and_says_so_for_a_run_without_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, optimizer = make()
    assert checkpoint.load(tmp_path / "none", stage=stage, optimizer=optimizer) == 0
    assert capsys.readouterr().err == ""
    (tmp_path / "metrics.jsonl").touch()
    assert checkpoint.load(tmp_path / "none", stage=stage, optimizer=optimizer) == 0
    assert "There is no checkpoint in" in capsys.readouterr().err
    assert same(stage, make()[0])


def test_save__keeps_the_last_k(tmp_path: Path) -> None:
    stage, optimizer = make()
    for number in (5, 10, 15, 20):
        checkpoint.save(tmp_path, step=number, stage=stage, optimizer=optimizer, keep=2)
    assert checkpoint.steps(tmp_path) == [15, 20]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000015", "step-00000020"]


def test_delete_old__finishes_what_a_kill_began_and_keeps_files_of_a_user(tmp_path: Path) -> None:
    for number in (5, 10, 15, 20):
        (tmp_path / f"step-{number:08d}").mkdir()
        (tmp_path / f"step-{number:08d}" / "state.pt").touch()
    (tmp_path / "step-00000005" / "notes.txt").write_text("mine")
    (tmp_path / "step-00000010" / "state.pt.sha256").touch()
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000003" / "state.pt.sha256").touch()  # a kill in the midst of deleting
    (tmp_path / "step-00000004.damaged").mkdir()
    checkpoint.delete_old(tmp_path, 2)
    names = ["step-00000004.damaged", "step-00000005", "step-00000015", "step-00000020"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [path.name for path in (tmp_path / "step-00000005").iterdir()] == ["notes.txt"]


def test_save__ignores_and_clears_half_written_checkpoints_of_a_killed_run(tmp_path: Path) -> None:
    stage, optimizer = make()
    checkpoint.save(tmp_path, step=5, stage=stage, optimizer=optimizer, keep=2)
    for incomplete in (".step-00000007.tmp", "step-00000008"):  # the second folder has no file
        (tmp_path / incomplete).mkdir()
    (tmp_path / ".step-00000007.tmp" / "state.pt").write_bytes(b"half")
    assert checkpoint.steps(tmp_path) == [5]
    assert checkpoint.load(tmp_path, stage=stage, optimizer=optimizer) == 5
    checkpoint.save(tmp_path, step=8, stage=stage, optimizer=optimizer, keep=2)
    assert checkpoint.steps(tmp_path) == [5, 8]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc] . "), OSError()],
)
def test_save__a_full_disk_leaves_the_older_checkpoint_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    stage, optimizer = make()
    checkpoint.save(tmp_path, step=5, stage=stage, optimizer=optimizer, keep=1)
    before = (tmp_path / "step-00000005" / "state.pt").read_bytes()

    def full(state: Any, file: Any) -> None:
        file.write(b"the first half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(RunFolderError, match="step 10 cannot be written") as caught:
            checkpoint.save(tmp_path, step=10, stage=stage, optimizer=optimizer, keep=1)
    assert "--resume" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert (tmp_path / "step-00000005" / "state.pt").read_bytes() == before
    assert checkpoint.load(tmp_path, stage=stage, optimizer=optimizer) == 5


class Payload:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def damage(file: Path, how: str) -> None:
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-400])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "noise":
        file.write_bytes(bytes(range(256)) * 8)
    elif how == "code":
        torch.save({"step": 10, "model": Payload(file.parent / "ran"), "optimizer": {}}, file)
    elif how == "bare pickle":
        file.write_bytes(pickle.dumps(Payload(file.parent / "ran")))
    elif how == "list":
        torch.save([1, 2], file)
    else:
        torch.save({"step": 10}, file)
    checksum_file(file).unlink()  # as in a checkpoint of an older version


@pytest.mark.parametrize("how", ["cut", "empty", "noise", "code", "bare pickle", "list", "without weights"])
def test_load__reports_a_damaged_checkpoint_and_never_runs_its_code(tmp_path: Path, how: str) -> None:
    stage, optimizer = make()
    for number in (5, 10):
        checkpoint.save(tmp_path, step=number, stage=stage, optimizer=optimizer, keep=2)
    damage(tmp_path / "step-00000010" / "state.pt", how)
    with pytest.raises(RunFolderError, match="cannot be loaded") as caught:
        checkpoint.load(tmp_path, stage=stage, optimizer=optimizer)
    assert "step-00000010" in str(caught.value)
    assert "Delete that folder to continue from step 5." in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch advises to run the code of the file
    assert len(str(caught.value).splitlines()) == 1
    assert [path.name for path in (tmp_path / "step-00000010").iterdir()] == ["state.pt"]


def test_load__reports_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    stage, optimizer = make()
    checkpoint.save(tmp_path, step=5, stage=stage, optimizer=optimizer, keep=2)
    wider, wider_optimizer = make(width=7)
    with pytest.raises(RunFolderError, match="cannot be loaded"):
        checkpoint.load(tmp_path, stage=wider, optimizer=wider_optimizer)


def save_on_each(rank: int, world_size: int, folder: str) -> tuple[int, dict[str, Any]]:
    stage, optimizer = make()
    step(stage, optimizer, 0)
    checkpoint.save(Path(folder), step=1, stage=stage, optimizer=optimizer, keep=2)
    # The barrier has passed, so every rank sees the checkpoint.
    return len(checkpoint.steps(Path(folder))), stage.state_dict()


def test_save__one_rank_writes_and_the_other_waits(tmp_path: Path, two_processes: TwoProcesses) -> None:
    (num_checkpoints, state), (num_on_rank_1, _) = two_processes.run(save_on_each, str(tmp_path))
    assert num_checkpoints == num_on_rank_1 == 1
    stage, _ = make(seed=3)
    stage.load_state_dict(state)  # computed in the other process: another number of threads adds in another order
    loaded, optimizer = make(seed=4)
    assert checkpoint.load(tmp_path, stage=loaded, optimizer=optimizer) == 1
    assert same(stage, loaded)


def save_on_a_full_disk(rank: int, world_size: int, folder: str) -> str:
    def full(_state: Any, _file: Any) -> None:
        raise OSError(28, "No space left on device")

    stage, optimizer = make()
    step(stage, optimizer, 0)
    original_save = torch.save
    torch.save = full  # type: ignore[assignment]
    try:
        with pytest.raises(RunFolderError) as caught:
            checkpoint.save(Path(folder), step=1, stage=stage, optimizer=optimizer, keep=2)
    finally:
        torch.save = original_save
    return str(caught.value) if caught.value.on_all_ranks else ""


def test_save__a_full_disk_ends_both_ranks(tmp_path: Path, two_processes: TwoProcesses) -> None:
    first, second = two_processes.run(save_on_a_full_disk, str(tmp_path))
    assert "step 1 cannot be written" in first
    assert first == second


def test_save_and_load__carry_the_loss_scale(tmp_path: Path) -> None:
    class Scale:
        value = 65536.0

        def state_dict(self) -> dict[str, float]:
            return {"scale": self.value}

        def load_state_dict(self, state_dict: dict[str, float]) -> None:
            self.value = state_dict["scale"]

    stage, optimizer = make()
    before, after = Scale(), Scale()
    before.value = 128.0
    checkpoint.save(tmp_path, step=1, stage=stage, optimizer=optimizer, keep=1, precision=before)
    checkpoint.load(tmp_path, stage=stage, optimizer=optimizer, precision=after)
    assert after.value == 128.0


@pytest.mark.parametrize("position", [0.01, 0.3, 0.6, 0.99])
def test_load__sets_a_checkpoint_with_a_flipped_bit_aside_and_continues_from_the_one_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], position: float
) -> None:
    stage, optimizer = make()
    for number in (5, 10):
        checkpoint.save(tmp_path, step=number, stage=stage, optimizer=optimizer, keep=2)
        weights = {name: value.clone() for name, value in stage.state_dict().items()}
        step(stage, optimizer, number)
    file = tmp_path / "step-00000010" / "state.pt"
    data = bytearray(file.read_bytes())
    data[int(position * len(data))] ^= 4
    file.write_bytes(data)
    assert checkpoint.load(tmp_path, stage=stage, optimizer=optimizer) == 5
    assert not torch.equal(stage.state_dict()["0.weight"], weights["0.weight"])
    said = capsys.readouterr().err
    assert "step-00000010/state.pt' is damaged" in said
    assert "set aside as 'step-00000010.damaged'" in said
    # The damaged checkpoint is not counted among the last k, so the whole one is not deleted for it.
    checkpoint.save(tmp_path, step=6, stage=stage, optimizer=optimizer, keep=2)
    assert checkpoint.steps(tmp_path) == [5, 6]


def test_load__refuses_where_every_checkpoint_is_damaged_and_changes_nothing(tmp_path: Path) -> None:
    stage, optimizer = make()
    checkpoint.save(tmp_path, step=5, stage=stage, optimizer=optimizer, keep=2)
    (tmp_path / "step-00000005" / "state.pt").write_bytes(b"")
    with pytest.raises(RunFolderError, match=r"is damaged.*--overwrite"):
        checkpoint.load(tmp_path, stage=stage, optimizer=optimizer)
    assert checkpoint.steps(tmp_path) == [5]
