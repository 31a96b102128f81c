"""GPU memory: how much a run takes, and advice for the user when it runs out."""

from __future__ import annotations

import torch

from pecobook.engine.launch import micro_batch_size, total_devices
from pecobook.errors import counted
from pecobook.settings.training import TrainConfig
from pecobook.settings.values import flags


def gpu_memory(device: torch.device) -> dict[str, float]:
    """Return the peak memory of this process's tensors, `gpu_memory` in GB; nothing on a CPU."""
    return {"gpu_memory": torch.cuda.max_memory_allocated(device) / 1e9} if device.type == "cuda" else {}


def out_of_memory_advice(config: TrainConfig, *, min_batch_size: int, evaluating: bool, unit: str = "images") -> str:
    """Return two lines that report where memory ran out and which flags help.

    Args:
        config: settings of the run.
        min_batch_size: minimum number of images per device that the stage can process in one pass.
        evaluating: whether memory ran out in an evaluation rather than in a training step.
        unit: what the run reads, "images" or "clips".
    """
    micro, known_flags = micro_batch_size(config), flags(type(config))
    images = counted(micro, unit)
    smaller = _smaller(config, micro, min_batch_size)
    if evaluating and "test.mode" in known_flags:
        return f"Out of GPU memory in the evaluation of single images.\n{_test_advice(config)}"
    if evaluating and "max-size" in known_flags:
        return "Out of GPU memory in the evaluation of single images.\nStart again with smaller --scales or --max-size."
    if smaller:
        where = "in the evaluation " if evaluating else ""
        return (
            f"Out of GPU memory {where}with {images} on a device.\n"
            f"Give --micro-batch-size {smaller}: the global batch stays the same."
        )
    remedies = ["a smaller --image-size"]
    if "pyramid.checkpointing" in known_flags and not vars(config)["pyramid"].checkpointing:
        remedies.insert(0, "--pyramid.checkpointing true")
    if config.precision == "fp32":
        remedies.append("--precision bf16")
    if total_devices(config) > 1 and config.strategy != "fsdp":
        remedies.append("--strategy fsdp")
    return f"Out of GPU memory with {images} on a device, the smallest number.\nGive {' or '.join(remedies)}."


def _smaller(config: TrainConfig, micro: int, min_batch_size: int) -> int:
    """Return the largest divisor of a device's share up to half of `micro`, or 0 if all are below the minimum."""
    share = config.batch_size // total_devices(config)
    return next((size for size in range(micro // 2, min_batch_size - 1, -1) if share % size == 0), 0)


def _test_advice(config: TrainConfig) -> str:
    test = vars(config)["test"]
    remedies = ["smaller --test.scales"] if len(test.scales) > 1 else []
    if test.mode == "whole" and not (config.strategy == "fsdp" and total_devices(config) > 1):
        remedies.insert(0, "--test.mode slide")
    if remedies:
        return f"Continue with --resume and {' or '.join(remedies)}."
    return "Start again with a smaller --test.max-side or --image-size."
