"""Durations: "5000" (steps), "100 epochs", "25600 images", or "5%" of the training; `steps` converts them to steps."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pecobook.errors import ConfigError
from pecobook.settings.values import refuse

_LONGEST = 10**12
"""Largest number of a duration."""
_DURATION = re.compile(r"^\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(|steps?|epochs?|ep|images?|%)\s*$", re.IGNORECASE)


def parse_duration(text: str, name: str) -> tuple[float, str]:
    """Split "100 epochs" into (100.0, "epochs"). Raises a ConfigError that names the flag `name`."""
    match = _DURATION.match(str(text))
    if not match:
        raise ConfigError(f"--{name} {_problem(text)}")
    unit = match[2].lower()
    units = {"": "steps", "step": "steps", "epoch": "epochs", "ep": "epochs", "image": "images"}
    return float(match[1]), units.get(unit, unit)


def check_durations(name: str, texts: Iterable[str], *, percent: bool) -> None:
    """Refuse field `name` of the settings if one of `texts` is not a duration.

    With `percent` a duration is part of the training and may be zero; otherwise it is the length of the training.
    """
    for text in texts:
        try:
            length, unit = parse_duration(text, name)
        except ConfigError:
            refuse(name, _problem(text, percent=percent))
        else:
            if length > (100 if unit == "%" else _LONGEST):
                limit = "100%, the length of the training" if unit == "%" else f"{_LONGEST:.0e} {unit}"
                refuse(name, f"must be at most {limit}, not {text}.")
            elif unit == "%" and not percent:
                refuse(name, f"is the length of the training: give steps or epochs, not {text}.")
            elif length == 0 and not percent:
                refuse(name, f"must be above 0, not {text}.")


def _problem(text: str, *, percent: bool = False) -> str:
    forms = "steps (5000), epochs ('100 epochs') or images ('25600 images')"
    if percent:
        forms = "steps (5000), epochs ('10 epochs'), images ('25600 images') or a share of the training ('5%')"
    return f"is '{text}': give {forms}."


def steps(text: str, *, num_images: int, batch_size: int, total: int | None = None, name: str = "max-steps") -> int:
    """Convert a duration to optimizer steps, at least 1 unless the duration is zero.

    Args:
        text: the duration, for example "100 epochs".
        num_images: number of images in one epoch.
        batch_size: number of images in one step, over all devices.
        total: number of steps in the whole training, which "N%" refers to.
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
    if count > 2**53:
        raise ConfigError(f"--{name} {text} is {count:.3g} steps, too many to count: give less.")
    return max(round(count), 1) if value > 0 else 0
