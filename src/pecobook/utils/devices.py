"""The GPUs and CPU cores that a process may use."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


def device(processes: int = 1) -> torch.device:
    """Return the GPU if there is one, otherwise the CPU.

    Several processes do not share an Apple GPU, and PECOBOOK_MPS=0 disables it.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    has_apple = processes == 1 and os.environ.get("PECOBOOK_MPS") != "0" and torch.backends.mps.is_available()
    return torch.device("mps" if has_apple else "cpu")


def apple_computes_bf16() -> bool:
    """Return whether this version of macOS computes in bfloat16 on Apple's GPUs."""
    return int(platform.mac_ver()[0].partition(".")[0] or 0) >= 14


def widest(values: Tensor) -> Tensor:
    """Return values in fp64, or in fp32 on Apple's GPUs, which have no fp64."""
    return values.float() if values.device.type == "mps" else values.double()


def cores() -> tuple[int, ...]:
    """Return the ids of the cores that this process may use, possibly fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def cpu_prefers_bf16() -> bool:
    """Return whether this CPU computes products faster in bfloat16 than in fp32.

    It does with AMX, and with AVX-512's bfloat16 instructions on AMD. Intel's processors have these instructions too if
    a virtual machine hides AMX, but take twice as long with them as in fp32.
    """
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    return torch.cpu._is_amx_tile_supported() or "GenuineIntel" not in _cpu_vendor()


# PyTorch before 2.7 has only the second, which is true in torch.compile too.
_tracing = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


@cache
def _cpu_vendor() -> str:
    """Return a short string that contains the CPU's vendor."""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            return next((line for line in lines if line.startswith("vendor_id")), "")
    except OSError:  # not Linux
        return platform.processor()


def gpus() -> tuple[str, ...]:
    """Return the GPUs that this process sees, with the names that CUDA_VISIBLE_DEVICES takes; empty without a GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return tuple(names[:count] if names else map(str, range(count)))


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished all its work; a CPU needs no waiting."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory(device: torch.device) -> int:
    """Return the peak number of bytes held by the GPU's allocator or, without a GPU, by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # Windows lacks it

    unit = 1 if platform.system() == "Darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def total_memory(device: torch.device) -> int:
    """Return the memory, in bytes, of the GPU or of this machine, whose memory Apple's GPUs share."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


_PEAKS = {
    "GB200": 2500,
    "B200": 2250,
    "H20": 148,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "A40": 150,
    "A30": 165,
    "A10G": 70,
    "A10": 125,
    "RTX A6000": 155,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
"""10^12 operations per second in bf16 on tensor cores that accumulate in fp32, without sparsity, from NVIDIA's data
sheets, by a part of the name that PyTorch reports."""


def peak_flops(device: torch.device) -> float | None:
    """Return the operations per second that the vendor states for a GPU in bf16; None for another device."""
    if device.type != "cuda":
        return None
    words = f" {re.sub('[-_]', ' ', torch.cuda.get_device_name(device))} "
    part = next((part for part in sorted(_PEAKS, key=len, reverse=True) if f" {part} " in words), None)
    return None if part is None else 1e12 * _PEAKS[part]


def exporting() -> bool:
    """Return whether torch.export is tracing, as for ONNX. PyTorch before 2.14 reports this in torch.compile too."""
    return _tracing() and not torch.compiler.is_dynamo_compiling()
