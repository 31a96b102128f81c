"""Durations: "5000" (steps), "100 epochs", "25600 images", or "5%" of the training; `steps` converts them to steps."""

from __future__ import annotations

import re

from pecobook.errors import ConfigError

_DURATION = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(|steps?|epochs?|ep|images?|%)\s*$", re.IGNORECASE)


def parse_duration(text: str, name: str) -> tuple[float, str]:
    """Split "100 epochs" into (100.0, "epochs"). Raises ConfigError that names the flag `name`."""
    match = _DURATION.match(str(text))
    if not match:
        raise ConfigError(f"--{name} is '{text}': give steps (5000), epochs ('100 epochs') or images ('25600 images').")
    unit = match[2].lower()
    units = {"": "steps", "step": "steps", "epoch": "epochs", "ep": "epochs", "image": "images"}
    return float(match[1]), units.get(unit, unit)


def steps(text: str, *, num_images: int, batch_size: int, total: int | None = None, name: str = "max-steps") -> int:
    """Convert a duration to optimizer steps, at least 1 unless the duration is zero.

    Args:
        text: the duration, for example "100 epochs".
        num_images: number of images in one epoch.
        batch_size: number of images in one step, over all devices.
        total: number of steps of the whole training, which "N%" refers to.
        name: name of the flag, for the error message.
    """
    value, unit = parse_duration(text, name)
    if unit == "%" and total is None:
        raise ConfigError(f"--{name} cannot be a percentage.")
    count = {
        "steps": value,
        "epochs": value * num_images / batch_size,
        "images": value / batch_size,
        "%": value / 100 * (total or 0),
    }[unit]
    return max(round(count), 1) if value > 0 else 0
