"""Keys of all images of a step before the first micro-batch, for losses that compare images of a whole step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from pecobook.data.batch import Batch


def micro_batches(stage: Any, model: Any, batches: Iterator[Batch], seed: Callable[[int], None]) -> Iterable[Batch]:
    """Return a step's micro-batches, read one by one, or those of `look_ahead` where the stage needs keys of all."""
    if not stage.needs_full_batch_keys:
        return batches
    step_batches = list(batches)
    return look_ahead(model, step_batches, seed) if len(step_batches) > 1 else step_batches


def look_ahead(model: Any, batches: list[Batch], seed: Callable[[int], None]) -> Iterator[Batch]:
    """Add the rows of all images of this rank's step, (count x B, ...), to each micro-batch, its own rows first.

    Args:
        model: returns rows of a batch marked as `ahead`.
        batches: count micro-batches of tensors (B, ...), on the model's device.
        seed: called with the number of each forward pass before that pass.
    """
    tensors = [cast("dict[str, Tensor]", batch) for batch in batches]
    size = len(next(iter(tensors[0].values())))
    rows = _rows_of_all(model, tensors, seed)
    for number, batch in enumerate(tensors):
        yield cast("Batch", {**batch, **{name: value.roll(-number * size, 0) for name, value in rows.items()}})


@torch.no_grad()
def _rows_of_all(model: Any, batches: list[dict[str, Tensor]], seed: Callable[[int], None]) -> dict[str, Tensor]:
    """Return rows (count x B, ...) in the order of the images.

    Each forward pass takes every count-th image of the step. BatchNorm mixes statistics of the images of one pass, so
    passes of whole micro-batches would let the loss recognise images of the same micro-batch: MoCo's shuffled BatchNorm
    (arXiv 1911.05722, section 3.3).
    """
    step_batch = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    first = next(iter(step_batch.values()))
    passes = torch.arange(len(first), device=first.device).view(-1, len(batches)).t()  # (count, B) image numbers
    outputs = []
    for number, images in enumerate(passes):
        seed(number)
        outputs.append(model({**{name: value[images] for name, value in step_batch.items()}, "ahead": True}).rows)
    order = passes.flatten().argsort()
    return {name: torch.cat([rows[name] for rows in outputs])[order] for name in outputs[0]}
