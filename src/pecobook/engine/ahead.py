"""Information shared between the micro-batches of a step, so that they have the same effect as one batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from pecobook.data.batch import Batch
from pecobook.utils.devices import widest
from pecobook.utils.distributed import mean_over_ranks


def micro_batches(stage: Any, model: Any, batches: Iterator[Batch], seed: Callable[[int], None]) -> Iterable[Batch]:
    """Return a step's micro-batches, read one by one, or those of `look_ahead` if the stage needs all images' keys."""
    if not stage.needs_full_batch_keys:
        return batches
    step_batches = list(batches)
    return look_ahead(model, step_batches, seed, stage.after_ahead) if len(step_batches) > 1 else step_batches


def loss_weights(
    stage: Any, batches: Iterator[Batch], count: int, world_size: int
) -> tuple[Iterator[Batch], list[Tensor | None]]:
    """Return the micro-batches of a step and a weight () for each one's loss; the mean over all ranks is 1.

    A loss that is a mean over, say, counted pixels is weighted by their share, so that `count` micro-batches on
    `world_size` ranks give the loss and the gradient of one batch. Without such a count (`Stage.loss_count`), or with a
    single micro-batch in total, the weights are None and the batches are read one by one.
    """
    if count * world_size == 1:
        return batches, [None]
    first = next(batches)
    number = stage.loss_count(first)
    if number is None:
        return itertools.chain([first], batches), [None] * count
    step_batches = [first, *batches]
    counts = widest(torch.stack([number, *(stage.loss_count(batch) for batch in step_batches[1:])]))
    mean = mean_over_ranks(counts.mean())
    weights = (counts / mean.clamp_min(torch.finfo(torch.float32).tiny)).float()
    return iter(step_batches), list(weights)


def look_ahead(
    model: Any,
    batches: list[Batch],
    seed: Callable[[int], None],
    after: Callable[[dict[str, Tensor]], bool] = lambda _: False,
) -> Iterator[Batch]:
    """Add the rows of all images of this rank's step, (count x B, ...), to each micro-batch, its own rows first.

    Args:
        model: returns rows of a batch marked as `ahead`.
        batches: count micro-batches of tensors (B, ...), on the model's device.
        seed: called with the number of each forward pass before that pass.
        after: called with the rows, which it may consume; returns whether to compute further rows with another pass.
    """
    tensors = [cast("dict[str, Tensor]", batch) for batch in batches]
    size = len(next(iter(tensors[0].values())))
    rows = _rows_of_all(model, tensors, seed)
    if after(rows):
        rows = {**_rows_of_all(model, tensors, seed), **rows}
    for number, batch in enumerate(tensors):
        yield cast("Batch", {**batch, **{name: value.roll(-number * size, 0) for name, value in rows.items()}})


@torch.no_grad()
def _rows_of_all(model: Any, batches: list[dict[str, Tensor]], seed: Callable[[int], None]) -> dict[str, Tensor]:
    """Return rows (count x B, ...) in the order of the images.

    Each forward pass takes every count-th image of the step. BatchNorm mixes the statistics of the images of one pass,
    so passes over whole micro-batches would let the loss recognise images of the same micro-batch: MoCo's shuffled
    BatchNorm (arXiv 1911.05722, section 3.3).
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
