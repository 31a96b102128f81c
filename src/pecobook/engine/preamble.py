"""The lines that a run shows before its first step: its images, model, devices and length."""

from __future__ import annotations

import torch
from torch import nn

from pecobook.data.source import Splits
from pecobook.data.summary import Lines, aligned, describe
from pecobook.engine.launch import micro_batch_size, total_devices
from pecobook.settings.durations import steps
from pecobook.settings.training import TrainConfig
from pecobook.utils.devices import apple_computes_bf16, device
from pecobook.utils.printer import show


def describe_run(stage: nn.Module, config: TrainConfig, num_images: int, unit: str = "images") -> Lines:
    """Return (topic, text) lines on the parameters, the devices with their precision, and the steps.

    Args:
        stage: the stage that is trained.
        config: settings with a resolved precision.
        num_images: number of training images.
        unit: what the run reads, "images" or "clips".
    """
    count, trained = parameter_counts(stage)
    parameters = f"{compact(count)} parameters" + (f", {compact(trained)} of them trained" if trained < count else "")
    total = steps(config.max_steps, num_images=num_images, batch_size=config.batch_size)
    epochs = total * config.batch_size / num_images
    devices, micro = total_devices(config), micro_batch_size(config)
    parts = config.batch_size // (micro * devices)
    batch = f"{config.batch_size:,} {unit} a step"
    if devices > 1 or parts > 1:
        places = f"{devices} devices" if devices > 1 else "1 device"
        batch += f" ({places}, {micro:,} {unit} at once" + (f", {parts} parts)" if parts > 1 else ")")
    if config.batch_size > num_images:
        batch += f": more than there are, so every step repeats {unit} (--batch-size {num_images} does not)"
    epoch_text = f"{epochs:.2g}" if epochs < 10 else f"{epochs:,.0f}"
    return [
        ("model", parameters),
        ("device", f"{device_name(devices)}, {config.precision}"),
        ("steps", f"{total:,} ({epoch_text} epochs), {batch}"),
    ]


def show_source(splits: Splits, *more: tuple[str, str]) -> None:
    """Print lines on the images, and the lines of `more`, for a command that trains nothing."""
    show("\n".join(aligned([*describe(splits), *more])))


def parameter_counts(stage: nn.Module) -> tuple[int, int]:
    """Return the number of all parameters of a module, and of the trained ones."""
    parameters = list(stage.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def compact(number: float) -> str:
    """Return a count with three digits, such as 12.3M; a count below a thousand is unchanged."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}" if number < 999.5 * unit else f"{number / unit:.0f}{name}"
    return f"{number:.0f}"


def device_name(count: int = 1) -> str:
    """Return the name of the GPU, or of the CPU with its threads, and how many devices train."""
    if torch.cuda.is_available():
        return f"{count} x {torch.cuda.get_device_name()}" if count > 1 else torch.cuda.get_device_name()
    if device(count).type == "mps":
        return "GPU of Apple" if apple_computes_bf16() else "GPU of Apple (bf16 needs macOS 14)"
    threads = torch.get_num_threads()
    threads_text = f"{threads} thread{'s' if threads > 1 else ''}"
    return f"{count} processes on the CPU, {threads_text} each" if count > 1 else f"CPU, {threads_text}"
