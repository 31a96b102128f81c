"""What to do when a GPU's memory is full."""

from __future__ import annotations

from pecobook.engine.launch import micro_batch_size, world_size
from pecobook.settings.training import TrainConfig
from pecobook.settings.values import flags


def advice(config: TrainConfig, *, least: int, evaluating: bool) -> str:
    """What happened and which flags help, in two lines.

    Args:
        config: of the run.
        least: fewest images that the stage takes at once on a device.
        evaluating: whether it happened among held-out images, not in a training step.
    """
    micro, known = micro_batch_size(config), flags(type(config))
    images = f"{micro} image{'s' if micro > 1 else ''}"
    smaller = _smaller(config, micro, least)
    if evaluating and "test.mode" in known:
        return f"Out of GPU memory in the evaluation, image by image.\n{_test_advice(config)}"
    if evaluating and "max-size" in known:
        return "Out of GPU memory in the evaluation, image by image.\nStart again with smaller --scales or --max-size."
    if smaller:
        where = "in the evaluation " if evaluating else ""
        return (
            f"Out of GPU memory {where}with {images} on a device.\n"
            f"Give --micro-batch-size {smaller}: the global batch stays the same."
        )
    ways = ["a smaller --image-size"]
    if "pyramid.checkpointing" in known and not vars(config)["pyramid"].checkpointing:
        ways.insert(0, "--pyramid.checkpointing true")
    if config.precision == "fp32":
        ways.append("--precision bf16")
    if world_size(config) > 1 and config.strategy != "fsdp":
        ways.append("--strategy fsdp")
    return f"Out of GPU memory with {images} on a device, and fewer cannot be.\nGive {' or '.join(ways)}."


def _smaller(config: TrainConfig, micro: int, least: int) -> int:
    """The largest size up to half of `micro` that a device's share divides into, 0 where that is below `least`."""
    share = config.batch_size // world_size(config)
    return next((size for size in range(micro // 2, least - 1, -1) if share % size == 0), 0)


def _test_advice(config: TrainConfig) -> str:
    test = vars(config)["test"]
    ways = ["smaller --test.scales"] if len(test.scales) > 1 else []
    if test.mode == "whole" and not (config.strategy == "fsdp" and world_size(config) > 1):
        ways.insert(0, "--test.mode slide")
    if ways:
        return f"Go on with --resume and {' or '.join(ways)}."
    return "Start again with a smaller --test.max-side or --image-size."
