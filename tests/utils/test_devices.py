"""Peak memory of a device, and the precision that a CPU is fast in."""

from __future__ import annotations

import pytest
import torch

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
