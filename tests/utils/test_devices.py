"""Peak memory of a device, the precision that a CPU is fast in, and what a machine with a GPU of Apple's does."""

from __future__ import annotations

import platform
from typing import Any

import lightning_fabric
import pytest
import torch

from pecobook.engine import launch
from pecobook.engine.attention import trainable_attention
from pecobook.engine.memory import gpu_memory
from pecobook.engine.preamble import device_name
from pecobook.errors import ConfigError
from pecobook.settings.training import TrainConfig
from pecobook.utils import devices
from pecobook.utils.devices import peak_memory


def test_peak_memory__of_a_cpu_is_that_of_the_process_in_bytes() -> None:
    assert 2**26 < peak_memory(torch.device("cpu")) < 2**45  # in KiB it would be far below 2**26


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40S", 362),
        ("NVIDIA GH200 480GB", None),  # another card than H200
        ("Tesla T4", None),
    ],
)
def test_peak_flops__by_the_name_of_the_gpu(
    name: str, teraflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    peak = devices.peak_flops(torch.device("cuda"))
    assert peak == (None if teraflops is None else 1e12 * teraflops)
    assert devices.peak_flops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("instructions", "amx", "maker", "expected"),
    [
        (False, False, "AuthenticAMD", False),
        (True, False, "AuthenticAMD", True),
        (True, True, "GenuineIntel", True),
        (True, False, "GenuineIntel", False),
    ],
)
def test_cpu_prefers_bf16__with_amx_or_on_amd(
    monkeypatch: pytest.MonkeyPatch, instructions: bool, amx: bool, maker: str, expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(devices, "_cpu_vendor", lambda: f"vendor_id : {maker}")
    assert devices.cpu_prefers_bf16() is expected


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Mac with one of Apple's GPUs, on which nothing of torch.cuda may be called that needs a GPU of NVIDIA."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a function of torch.cuda was called")

    for name in dir(torch.cuda):
        if name[0].islower() and callable(getattr(torch.cuda, name)) and name not in ("is_available", "device_count"):
            monkeypatch.setattr(torch.cuda, name, refused)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(platform, "mac_ver", lambda: ("14.5", ("", "", ""), "arm64"))
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    return monkeypatch


def test_apple__one_process_takes_the_gpu_and_several_take_the_cpu(mac: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []

    class Recorder:
        strategy = None

        def __init__(self, **arguments: Any) -> None:
            started.append(arguments)

        def launch(self) -> None:
            pass

    mac.setattr(lightning_fabric, "Fabric", Recorder)
    launch.start(TrainConfig(precision="bf16"))
    launch.start(TrainConfig(precision="bf16"), alone=True)
    mac.setenv("PECOBOOK_MPS", "0")
    launch.start(TrainConfig(precision="bf16"))
    assert [(given["accelerator"], given["devices"]) for given in started] == [("mps", 1), ("mps", 1), ("cpu", 1)]
    assert [given["plugins"][0].device for given in started] == ["mps", "mps", "cpu"]
    assert devices.device(2).type == devices.device().type == "cpu"


@pytest.mark.parametrize(("macos", "precision"), [("14.5", "bf16"), ("15.0", "bf16"), ("13.6", "fp32")])
def test_apple__computes_in_bf16_where_macos_can(mac: pytest.MonkeyPatch, macos: str, precision: str) -> None:
    mac.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), "arm64"))
    assert launch.resolve_precision(TrainConfig()) == precision
    assert ("bf16 needs macOS 14" in device_name()) == (precision == "fp32")
    if precision == "fp32":
        with pytest.raises(ConfigError, match="--precision bf16 needs macOS 14 or newer"):
            launch.resolve_precision(TrainConfig(precision="bf16"))
    with pytest.raises(ConfigError, match="--precision fp16 needs a GPU of NVIDIA"):
        launch.resolve_precision(TrainConfig(precision="fp16"))


def test_apple__is_asked_for_nothing_of_cuda(mac: pytest.MonkeyPatch) -> None:
    waited: list[bool] = []
    mac.setattr(torch.mps, "synchronize", lambda: waited.append(True))
    place = devices.device()
    devices.synchronize(place)
    assert waited == [True]
    assert gpu_memory(place) == {}
    assert devices.peak_memory(place) > 2**16
    assert devices.total_memory(place) > 2**26
    for kernel in ("sdpa", "triton"):
        with trainable_attention(place, kernel):
            pass
    assert devices.widest(torch.zeros(2)).dtype == torch.float64  # on a CPU
