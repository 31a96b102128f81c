"""Every stage in two processes: DDP and FSDP give the losses and weights of one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from pecobook.engine import checkpoint
from pecobook.errors import RunFolderError
from pecobook.stages.codebook import CodebookStage
from tests.distributed import TwoProcesses
from tests.runs import SMALL, losses, train, without_norm


def train_on_each(rank: int, world_size: int, command: str, data: str, out: str, more: dict[str, Any]) -> None:
    train(command, data, Path(out), **more)


# Contrast is left out: on a CPU its BatchNorm sees half of the batch (on GPUs BatchNorm is synchronised).
@pytest.mark.parametrize("command", ["codebook", "pretrain", "finetune"])
def test_train__ddp_equals_one_process(
    command: str, images: Path, needs: dict[str, str], tmp_path: Path, two_processes: TwoProcesses
) -> None:
    # A large epsilon keeps Adam from amplifying the rounding of gradients near zero.
    more: dict[str, Any] = {**needs, "max_steps": "3", "optim.eps": 1e-3}
    if command != "codebook":
        more["drop_path"] = 0.0  # each process draws other numbers
    if command == "finetune":
        more |= {
            "mixup": 0.0,
            "cutmix": 0.0,
            "random_erasing": 0.0,
        }  # each process draws numbers for its own half of the batch
    alone = train(command, images, tmp_path / "one", **more)
    two_processes.run(train_on_each, command, str(images), str(tmp_path / "two"), {**more, "devices": "2"})
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), rel=2e-5)
    exported, expected = export_of(tmp_path / "two"), export_of(alone)
    assert exported.keys() == expected.keys()
    for name, value in exported.items():
        torch.testing.assert_close(value, expected[name], rtol=0.05, atol=3e-3)  # Adam's first steps amplify rounding


def contrast_on_each(rank: int, world_size: int, data: str, out: str, more: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pecobook.stages.moco.mlp", without_norm)
        train("contrast", data, Path(out), **more)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_train__contrast_in_micro_batches_equals_one_process(
    strategy: str, images: Path, tmp_path: Path, two_processes: TwoProcesses
) -> None:
    more: dict[str, Any] = {"max_steps": "3", "optim.eps": 1e-3, "model.name": "vit_tiny_patch16_224"}
    more["model.args"] = SMALL["pretrain"]["model.args"]
    contrast_on_each(0, 1, str(images), str(tmp_path / "one"), more)
    more |= {"micro_batch_size": 2, "devices": "2", "strategy": strategy}
    two_processes.run(contrast_on_each, str(images), str(tmp_path / "two"), more)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        {"adversarial.weight": 0.4, "adversarial.width": 4, "adversarial.num_layers": 1, "balance": True},
        {"explicit.kind": "classification"},
        {"quantizer.kind": "gradient"},
        {"quantizer.kind": "simvq"},
    ],
    ids=lambda more: next(iter(more)),
)
def test_train__variants_of_the_codebook_under_ddp_equal_one_process(
    more: dict[str, Any], images: Path, tmp_path: Path, two_processes: TwoProcesses
) -> None:
    more = {**more, "max_steps": "4"}  # two before the codebook starts and two after
    alone = train("codebook", images, tmp_path / "one", **more)
    two_processes.run(train_on_each, "codebook", str(images), str(tmp_path / "two"), {**more, "devices": "2"})
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), rel=2e-4)


def export_to_a_full_disk(rank: int, world_size: int, data: str, out: str) -> str:
    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    original = CodebookStage.export
    CodebookStage.export = full  # type: ignore[method-assign, assignment]
    try:
        train("codebook", data, Path(out), max_steps="1", devices="2")
    except RunFolderError as error:
        return str(error)
    finally:
        CodebookStage.export = original  # type: ignore[method-assign]
    return ""


def test_train__an_export_that_cannot_be_written_ends_both_ranks(
    images: Path, tmp_path: Path, two_processes: TwoProcesses
) -> None:
    first, second = two_processes.run(export_to_a_full_disk, str(images), str(tmp_path))
    assert "No space left" in first
    assert "--resume" in first
    assert first == second


def export_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


@pytest.mark.parametrize("command", list(SMALL))
def test_train__fsdp_equals_ddp_and_resumes(
    command: str, images: Path, needs: dict[str, str], tmp_path: Path, two_processes: TwoProcesses
) -> None:
    more: dict[str, Any] = {**needs, "devices": "2", "max_steps": "4"}
    more |= {"save_every": 2}
    copied, sharded = tmp_path / "ddp", tmp_path / "fsdp"
    two_processes.run(train_on_each, command, str(images), str(copied), {**more, "strategy": "ddp"})
    two_processes.run(train_on_each, command, str(images), str(sharded), {**more, "strategy": "fsdp"})
    assert losses(sharded) == pytest.approx(losses(copied), rel=1e-3)
    before = export_of(sharded)
    assert before.keys() == export_of(copied).keys()
    assert {name: value.shape for name, value in before.items()} == {
        name: value.shape for name, value in export_of(copied).items()
    }
    assert checkpoint.steps(sharded / "checkpoints") == [2, 4]
    shutil.rmtree(sharded / "checkpoints" / "step-00000004")
    shutil.rmtree(sharded / "export")
    two_processes.run(train_on_each, command, str(images), str(sharded), {**more, "strategy": "fsdp", "resume": True})
    after = export_of(sharded)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_train__communication_in_bf16_rounds_what_is_exchanged(
    strategy: str, images: Path, codebook_run: Path, tmp_path: Path, two_processes: TwoProcesses
) -> None:
    common: dict[str, Any] = {"tokenizer": str(codebook_run), "devices": "2", "max_steps": "4", "strategy": strategy}
    common["precision"] = "bf16"
    for name in ("fp32", "bf16"):
        more = {**common, "communication": name}
        two_processes.run(train_on_each, "pretrain", str(images), str(tmp_path / name), more)
    low, high = losses(tmp_path / "bf16"), losses(tmp_path / "fp32")
    assert low == pytest.approx(high, rel=1e-2)
    assert low != high
    (exported, expected) = (export_of(tmp_path / name) for name in ("bf16", "fp32"))
    assert {name: value.dtype for name, value in exported.items()} == {n: v.dtype for n, v in expected.items()}


_BF16 = {"precision": "bf16", "residual": "bf16", "communication": "bf16"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "tolerance"),
    [({"strategy": "fsdp"}, 1e-4), ({"strategy": "fsdp", **_BF16}, 1e-2), ({"strategy": "ddp", **_BF16}, 1e-2)],
    ids=["fsdp", "fsdp in bf16", "ddp in bf16"],
)
def test_train__compiled_in_two_processes_equals_uncompiled(
    more: dict[str, Any],
    tolerance: float,
    images: Path,
    codebook_run: Path,
    tmp_path: Path,
    two_processes: TwoProcesses,
) -> None:
    more = {"tokenizer": str(codebook_run), "devices": "2", "max_steps": "2", **more}
    for compiled in (False, True):
        settings = {**more, "compile": compiled}
        graphs = two_processes.run(compiled_on_each, str(images), str(tmp_path / str(compiled)), settings, limit=500)
        assert all(number > 0 for number in graphs) == compiled
    assert losses(tmp_path / "True") == pytest.approx(losses(tmp_path / "False"), rel=tolerance)
    assert {value.dtype for value in export_of(tmp_path / "True").values()} <= {torch.float32, torch.int64}


def compiled_on_each(rank: int, world_size: int, data: str, out: str, more: dict[str, Any]) -> int:
    """Train with graphs that the backend runs uncompiled, which takes seconds; return the number of graphs."""
    counters.clear()  # of an earlier test in this process
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        compile_module = torch.nn.Module.compile
        patch.setattr(torch.nn.Module, "compile", lambda self: compile_module(self, backend="aot_eager"))
        train("pretrain", data, Path(out), **more)
    return int(counters["stats"]["unique_graphs"])


def test_train__lars_under_fsdp_equals_ddp(images: Path, tmp_path: Path, two_processes: TwoProcesses) -> None:
    """LARS computes trust ratios of whole matrices, also if each process holds half of a matrix."""
    # At a learning rate of 0.3, with so few images, the fourth step amplifies a rounding error a thousand times.
    more: dict[str, Any] = {"optim.name": "lars", "optim.lr": 0.1, "devices": "2", "max_steps": "4"}
    for strategy in ("ddp", "fsdp"):
        settings = {**more, "strategy": strategy}
        two_processes.run(train_on_each, "contrast", str(images), str(tmp_path / strategy), settings)
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "ddp"), rel=1e-4)


def test_train__a_codebook_resumes_in_more_processes(images: Path, tmp_path: Path, two_processes: TwoProcesses) -> None:
    more: dict[str, Any] = {"max_steps": "8", "save_every": 4}
    run = train("codebook", images, tmp_path / "run", **more)
    before, alone = losses(run), export_of(run)
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    two_processes.run(train_on_each, "codebook", str(images), str(run), {**more, "devices": "2", "resume": True})
    assert losses(run)[:4] == before[:4]
    assert losses(run) == pytest.approx(before, rel=2e-4)
    codebook = export_of(run)["quantizer.codebook"]
    torch.testing.assert_close(codebook, alone["quantizer.codebook"], rtol=0.05, atol=3e-3)


def test_train__an_fsdp_checkpoint_resumes_in_one_process(
    images: Path, codebook_run: Path, tmp_path: Path, two_processes: TwoProcesses
) -> None:
    more: dict[str, Any] = {"tokenizer": str(codebook_run), "max_steps": "4", "save_every": 2, "drop_path": 0.0}
    run = tmp_path / "run"
    two_processes.run(train_on_each, "pretrain", str(images), str(run), {**more, "strategy": "fsdp", "devices": "2"})
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    before = losses(run)
    train("pretrain", images, run, **more, resume=True)
    assert losses(run) == pytest.approx(before, rel=1e-3)
    assert losses(run)[:2] == before[:2]

    network = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=0,
        img_size=16,
        patch_size=4,
        depth=2,
        embed_dim=32,
        num_heads=2,
        init_values=0.1,
        global_pool="avg",
    )
    network.load_state_dict(export_of(run))
