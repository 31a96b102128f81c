"""The batches of a training, on its device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pecobook.data.batch import Batch
from pecobook.data.stream import to_device
from pecobook.engine.skipped import Skipped
from pecobook.engine.speed import Speed


class Feed(Iterator[Batch]):
    """Moves batches to a device, and records the time spent waiting for them and what could not be read.

    A GPU gets them on a separate stream. The process runs ahead of the GPU, so the copy overlaps with the previous
    step.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device, speed: Speed, skipped: Skipped) -> None:
        self._batches, self._device, self._speed, self._skipped = batches, device, speed, skipped
        is_gpu = device.type == "cuda"
        self._copies: Any = torch.cuda.Stream(device) if is_gpu else None  # type: ignore[no-untyped-call]

    def __next__(self) -> Batch:
        """Return the next micro-batch."""
        began = time.monotonic()
        with nullcontext() if self._copies is None else torch.cuda.stream(self._copies):
            batch = next(self._batches)
            self._skipped.note(batch["skipped"])
            batch = to_device(batch, self._device)
        if self._copies is not None:
            training = torch.cuda.current_stream(self._device)
            training.wait_stream(self._copies)
            for value in batch.values():
                for tensor in value if isinstance(value, list) else [value]:
                    if isinstance(tensor, Tensor):  # its memory may be used again when the training has read it
                        tensor.record_stream(training)
        self._speed.waited += time.monotonic() - began
        return batch
