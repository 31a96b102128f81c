from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pecobook.engine import launch
from pecobook.engine.launch import deterministic
from pecobook.engine.world import is_leader
from pecobook.errors import ConfigError
from pecobook.settings.pretrain import PretrainConfig
from pecobook.settings.training import TrainConfig


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("batch", "devices", "max_micro", "micro"),
    [(64, "1", 0, 64), (64, "2", 0, 32), (64, "2", 20, 16), (60, "1", 7, 6), (7, "1", 5, 1), (8, "1", 99, 8)],
)
def test_micro_batch_size__is_the_largest_divisor_that_fits(
    batch: int, devices: str, max_micro: int, micro: int
) -> None:
    config = TrainConfig(batch_size=batch, devices=devices, micro_batch_size=max_micro)
    assert launch.micro_batch_size(config) == micro
    assert batch % (micro * int(devices)) == 0


def test_micro_batch_size__refuses_unequal_shares() -> None:
    with pytest.raises(ConfigError, match="--batch-size 64 cannot be shared evenly by 3 devices"):
        launch.micro_batch_size(TrainConfig(batch_size=64, devices="3"))


def test_world_size__from_flags_or_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(devices="3", num_nodes=2)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="--num-nodes 2: start the processes on all machines with torchrun or srun"):
        launch.total_devices(config)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    assert (launch.device_count(config), launch.total_devices(config)) == (3, 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "8")
    for agreeing in (TrainConfig(), TrainConfig(devices="4", num_nodes=2)):
        assert (launch.device_count(agreeing), launch.total_devices(agreeing)) == (4, 8)
    with pytest.raises(ConfigError, match=r"--devices 3: torchrun has started 4 processes on each machine\. Leave"):
        launch.total_devices(config)
    with pytest.raises(ConfigError, match="--num-nodes 3: torchrun has started processes on 2 machines"):
        launch.total_devices(TrainConfig(num_nodes=3))


def test_device_count__of_a_launcher_needs_a_gpu_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="torchrun has started 4 processes on a machine with 2 GPUs"):
        launch.device_count(TrainConfig())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert launch.device_count(TrainConfig()) == 4


def test_device_count__auto_is_one_without_gpus_and_all_with(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.device_count(TrainConfig()) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launch.device_count(TrainConfig()) == 2
    with pytest.raises(ConfigError, match="--devices 3: this machine has 2 GPUs"):
        launch.device_count(TrainConfig(devices="3"))


def test_resolve_precision__auto_is_bf16_where_the_cpu_is_faster_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_faster, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(launch, "cpu_prefers_bf16", lambda is_faster=is_faster: is_faster)
        assert launch.resolve_precision(TrainConfig()) == expected
    assert launch.resolve_precision(TrainConfig(precision="bf16")) == "bf16"
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        launch.resolve_precision(TrainConfig(precision="fp16"))


def test_a_training_imports_neither_torchmetrics_nor_transformers_nor_an_extra(images: Path, tmp_path: Path) -> None:
    """Lightning would import both, which takes seconds at every start. `pip install pecobook` brings no extra."""
    run = tmp_path / "run"
    program = (
        "import sys; from tests.runs import train\n"
        "sys.modules |= dict.fromkeys(('scipy', 'skimage', 'sklearn', 'tensorboard', 'threadpoolctl'))\n"
        f"train('codebook', {str(images)!r}, {str(run)!r}, max_steps='1', loggers=('auto',))\n"
        "assert 'lightning_fabric' in sys.modules\n"
        "assert not {'torchmetrics', 'transformers', 'pandas', 'pecobook.stages.detect'} & sys.modules.keys()\n"
        "del sys.modules['scipy']; import torchmetrics; assert torchmetrics.__version__"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "TensorBoard's event files need pip install 'pecobook[tensorboard]'" in (run / "train.log").read_text()
    assert (run / "curves.png").is_file()
    assert not list(run.glob("events*"))


def test_check_low_precision__a_residual_stream_in_bf16_needs_bf16() -> None:
    with pytest.raises(ConfigError, match="--residual bf16: the precision is fp32 here: give --precision bf16 too"):
        launch.check_low_precision(PretrainConfig(precision="fp32", residual="bf16"))
    launch.check_low_precision(PretrainConfig(precision="bf16", residual="bf16"))


def test_check_low_precision__gathered_weights_in_bf16_need_bf16() -> None:
    low = TrainConfig(precision="fp32", communication="bf16", strategy="fsdp")
    with pytest.raises(ConfigError, match="the precision is fp32: give --precision bf16 too"):
        launch.check_low_precision(low)
    for more in ({"strategy": "ddp"}, {"precision": "bf16"}, {"communication": "fp32"}):
        launch.check_low_precision(dataclasses.replace(low, **more))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "NODE_RANK"])
def test_is_leader__only_the_first_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_leader()
    monkeypatch.setenv(name, "0")
    assert is_leader()
    monkeypatch.setenv(name, "1")
    assert is_leader()  # left from something else: the processes of a run have a world
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_leader()


@pytest.mark.parametrize(
    ("device", "enabled", "one_size", "expected"),
    [
        ("cuda", False, True, True),
        ("cuda", False, False, False),
        ("cuda", True, True, False),
        ("cpu", False, True, False),
    ],
)
def test_deterministic__or_cudnn_tries_kernels(device: str, enabled: bool, one_size: bool, expected: bool) -> None:
    with deterministic(torch.device(device), enabled, one_size=one_size):
        assert torch.backends.cudnn.benchmark is expected
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize(("device", "enabled"), [("cuda", True), ("cuda", False), ("cpu", True)])
def test_deterministic__enables_deterministic_kernels_and_restores_the_state(
    device: str, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # a value that is set stays, and other tests see none
    with deterministic(torch.device(device), enabled):
        assert torch.are_deterministic_algorithms_enabled() == (enabled and device == "cuda")
        assert torch.is_deterministic_algorithms_warn_only_enabled() == (enabled and device == "cuda")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert not torch.are_deterministic_algorithms_enabled()
