"""What a run would cost in memory and time, measured on part of a training step. Nothing is written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pecobook.data.stream import Stream, collate, default_workers, to_device
from pecobook.data.summary import Lines
from pecobook.engine.attention import trainable_attention
from pecobook.engine.launch import device_count, micro_batch_size, total_devices
from pecobook.engine.log import compact_duration
from pecobook.engine.memory import out_of_memory_advice
from pecobook.engine.optim import build_optimizer
from pecobook.engine.stage import Stage
from pecobook.errors import PecobookError, counted
from pecobook.settings.durations import steps
from pecobook.settings.training import TrainConfig
from pecobook.utils.devices import device, peak_memory, synchronize, total_memory

_ENOUGH = {
    "cpu": 1.0,
    "mps": 1.0,
    "cuda": 10.0,
}  # seconds: a measurement that took longer is not repeated with more images


class Measured(NamedTuple):
    """The measured part of a step on one device."""

    images: int
    """Number of images in the largest forward and backward pass."""
    read: float
    """Seconds that one process takes to read an image and make its view."""
    compute: float
    """Seconds of forward and backward pass per image."""
    update: float
    """Seconds of the optimizer step and of what the stage does after it."""
    weights: int
    """Bytes of all weights and buffers."""
    gradients: int
    """Bytes of the gradients."""
    optimizer: int
    """Bytes of the optimizer's state."""
    activations: int
    """Bytes that the forward pass over all images on a device keeps for the backward pass."""
    peak: int
    """Peak memory of a GPU in bytes; 0 on a CPU."""


def estimate(stage: Stage[Any], train: Stream, config: TrainConfig) -> Lines:
    """Return (topic, text) lines on memory and time, measured on this device. The stage's weights change.

    Raises:
        PecobookError: the images of a step do not fit into GPU memory.
    """
    unit = train.source.unit
    try:
        measured = measure(stage, train, config)
    except torch.OutOfMemoryError:
        advice = out_of_memory_advice(config, min_batch_size=stage.min_batch_size, evaluating=False, unit=unit)
        raise PecobookError(advice) from None
    return [
        ("memory", _memory_text(measured, config, total_memory(device()), unit)),
        ("cost", _cost_text(measured, config, len(train), unit)),
    ]


def measure(stage: Stage[Any], train: Stream, config: TrainConfig) -> Measured:
    """Run forward and backward passes with increasing numbers of images, and one optimizer step; write nothing."""
    place, micro = device(), micro_batch_size(config)
    stage.to(place).train()
    optimizer = build_optimizer(stage.parameter_groups(config.optim), config.optim, fused=config.precision != "fp16")
    count = min(micro, max(stage.min_batch_size, 2))
    with trainable_attention(place, config.attention), autocast(config.precision, place):
        read, compute, kept = _pass(stage, train, count, keep=True)
        activations = kept * micro // count
        if compute < 10 * _ENOUGH[place.type]:
            # What is kept once for all images, such as weights in half precision, is in both numbers.
            more = min(2 * count, micro)
            read, compute, kept_of_more = _pass(stage, train, more, keep=True)
            if more > count:
                activations = kept + (kept_of_more - kept) * (micro - count) // (more - count)
            count = more
        while compute < _ENOUGH[place.type] and count < micro:
            count = min(4 * count, micro)
            read, compute, _ = _pass(stage, train, count)
    trained = [parameter for parameter in stage.parameters() if parameter.grad is not None]
    began = time.perf_counter()
    optimizer.step()
    stage.after_step(1, steps(config.max_steps, num_images=len(train), batch_size=config.batch_size))
    synchronize(place)
    update = time.perf_counter() - began
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return Measured(
        images=count,
        read=read / count,
        compute=compute / count,
        update=update,
        weights=num_bytes([*stage.parameters(), *stage.buffers()]),
        gradients=num_bytes(trained),
        optimizer=num_bytes(states),
        activations=activations,
        peak=peak_memory(place) if place.type == "cuda" else 0,
    )


def _pass(stage: Stage[Any], train: Stream, count: int, *, keep: bool = False) -> tuple[float, float, int]:
    """Run one forward and backward pass on `count` images.

    Returns:
        the seconds of reading, the seconds of computing, and with `keep` the bytes of the tensors other than weights
        that the forward pass keeps for the backward pass.
    """
    place = device()
    began = time.perf_counter()
    batch = collate([train[position] for position in range(count)])
    read = time.perf_counter() - began
    batch = to_device(batch, place)
    stage.zero_grad()
    synchronize(place)
    weights = {parameter.untyped_storage().data_ptr() for parameter in stage.parameters()}
    blocks: dict[int, int] = {}  # each memory block once, since several tensors share one

    def note(tensor: Tensor) -> Tensor:
        block = tensor.untyped_storage()
        if block.data_ptr() not in weights:
            blocks[block.data_ptr()] = block.nbytes()
        return tensor

    began = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor) if keep else nullcontext():
        loss = stage(batch).loss
    loss.backward()
    synchronize(place)
    return read, time.perf_counter() - began, sum(blocks.values())


def autocast(precision: str, place: torch.device) -> torch.autocast:
    """Return a context that computes on a device in the (resolved) precision of the settings."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(place.type, dtype or torch.bfloat16, enabled=dtype is not None)


def num_bytes(tensors: Sequence[Tensor]) -> int:
    """Return the total bytes of some tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _memory_text(measured: Measured, config: TrainConfig, available: int, unit: str = "images") -> str:
    """Return the memory of each part of a step on a device, and advice if it exceeds `available` bytes."""
    micro, devices = micro_batch_size(config), total_devices(config)
    shards = devices if config.strategy == "fsdp" else 1
    parts = {
        "weights": measured.weights // shards,
        "gradients": measured.gradients // shards,
        "optimizer": measured.optimizer // shards,
        "activations": measured.activations,
    }
    total = sum(parts.values())
    listed = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items())
    text = f"about {size_text(total)}{' on each device' if devices > 1 else ''}: {listed}"
    text += f" of {counted(micro, unit)} at once"
    if measured.peak:
        peak = f"{size_text(measured.peak)} of {size_text(available)}"
        text += f"; measured peak with {counted(measured.images, unit)}: {peak}"
    elif total > available:
        share, image = config.batch_size // devices, max(measured.activations / micro, 1)
        fitting = int((available - total + measured.activations) / image)
        smaller = next((size for size in range(min(fitting, micro), 0, -1) if share % size == 0), 0)
        advice = f"give --micro-batch-size {smaller}" if smaller else "it does not fit"
        text += f". There are {size_text(available)} here: {advice}"
    return text


def _cost_text(measured: Measured, config: TrainConfig, num_images: int, unit: str = "images") -> str:
    share = config.batch_size // total_devices(config)
    workers = default_workers(device_count(config)) if config.workers < 0 else config.workers
    compute, read = measured.compute * share + measured.update, measured.read * share / max(workers, 1)
    step = max(compute, read) if workers else compute + read
    total = steps(config.max_steps, num_images=num_images, batch_size=config.batch_size)
    place = "reading" if workers and read > compute else "computing"
    text = f"about {seconds_text(step)} a step, {compact_duration(step * total)} in all, evaluations not counted"
    text += f"; measured on {counted(measured.images, unit)}"
    text += f": {seconds_text(measured.compute)} each, {seconds_text(measured.read)} to read one"
    text += f", so {place} sets the pace" if workers else ""
    return text + (", without --compile" if config.compile else "")


def size_text(size: float) -> str:
    """Return a number of bytes in kB, MB or GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}" if size < 999.5 * unit else f"{size / unit:.0f} {name}"
    return f"{size / 1e3:.3g} kB"


def seconds_text(seconds: float) -> str:
    """Return a short duration with two digits: 3.4 ms, 120 ms, 2.5 s; from a minute on like `compact_duration`."""
    if seconds >= 60:
        return compact_duration(seconds)
    number, unit = (seconds, "s") if seconds >= 1 else (1000 * seconds, "ms")
    return f"{number:.2g} {unit}" if number < 10 else f"{number:.0f} {unit}"
