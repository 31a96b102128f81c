"""Training speed: images per second, waiting time for data, and operations per second relative to the GPU's peak."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pecobook.utils.devices import peak_flops

_COUNT_AFTER = 20.0
"""Seconds of training after which its operations are counted, so that counting does not slow down the start."""


class Speed:
    """Measures the speed between logged steps.

    Args:
        step: the step that the training starts from.
        now: the time in seconds, as in all other arguments of this name.
        batch_size: number of images per step.
        flop: returns the operations per image, forward and backward; None if unknown.
        device: the device of this process.
        num_devices: number of devices of all processes.
        precision: fp32, bf16 or fp16.
    """

    def __init__(
        self,
        step: int,
        now: float,
        *,
        batch_size: int,
        flop: Callable[[], float | None],
        device: torch.device,
        num_devices: int,
        precision: str,
    ) -> None:
        self.waited = 0.0
        """Seconds spent waiting for data since the last measurement."""
        self._step, self._since, self._began = step, now, now
        self._batch_size, self._flop, self._num_devices = batch_size, flop, num_devices
        self._peak = peak_flops(device) if precision != "fp32" else None
        self._flop_of_image: float | None = None

    def leave_out(self, seconds: float) -> None:
        """Exclude time that was spent on something other than training."""
        self._since += seconds
        self._began += seconds

    def measure(self, step: int, now: float) -> dict[str, float]:
        """Return the speed since the last measurement.

        Returns:
            `images_per_second` on all devices, `data_wait` (a share of the time) and, if the operations are known,
            `tflops`, 10^12 operations per second on each device, and `mfu`, their share of its peak.
        """
        elapsed = max(now - self._since, 1e-9)
        images = (step - self._step) * self._batch_size / elapsed
        values = {"images_per_second": images, "data_wait": min(self.waited / elapsed, 1.0)}
        if self._flop_of_image is None and now - self._began > _COUNT_AFTER:
            self._flop_of_image = self._flop() or 0.0
        if self._flop_of_image:
            flops = self._flop_of_image * images / self._num_devices
            values["tflops"] = flops / 1e12
            values |= {"mfu": flops / self._peak} if self._peak else {}
        self._step, self.waited = step, 0.0
        return values

    def restart(self, now: float) -> None:
        """Start measuring from now."""
        self._since = now
