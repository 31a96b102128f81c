"""Micro-batches that know of each other, for losses that compare images of a whole step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from pecobook.data.batch import Batch


def micro_batches(stage: Any, model: Any, batches: Iterator[Batch], seed: Callable[[int], None]) -> Iterable[Batch]:
    """A step's micro-batches as they are read, one by one; where the stage needs keys of all, those of `look_ahead`."""
    if not stage.needs_full_batch_keys:
        return batches
    whole = list(batches)
    return look_ahead(model, whole, seed) if len(whole) > 1 else whole


def look_ahead(model: Any, batches: list[Batch], seed: Callable[[int], None]) -> Iterator[Batch]:
    """Micro-batches with the rows of all images of this rank's step, (count x B, ...), each with its own first.

    Args:
        model: returns rows of a batch marked as `ahead`.
        batches: of tensors (B, ...), on the model's device.
        seed: called with the number of each forward pass before it.
    """
    tensors = [cast("dict[str, Tensor]", batch) for batch in batches]
    size = len(next(iter(tensors[0].values())))
    rows = _rows_of_all(model, tensors, seed)
    for number, batch in enumerate(tensors):
        yield cast("Batch", {**batch, **{name: value.roll(-number * size, 0) for name, value in rows.items()}})


@torch.no_grad()
def _rows_of_all(model: Any, batches: list[dict[str, Tensor]], seed: Callable[[int], None]) -> dict[str, Tensor]:
    """Rows (count x B, ...) in the order of the images.

    The images are mixed for it, every count-th in one forward pass, since BatchNorm would let those know each other
    that came together: MoCo's shuffled BatchNorm (arXiv 1911.05722, section 3.3).
    """
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    first = next(iter(whole.values()))
    mixed = torch.arange(len(first), device=first.device).view(-1, len(batches)).t()  # (count, B)
    seen = []
    for number, chosen in enumerate(mixed):
        seed(number)
        seen.append(model({**{name: value[chosen] for name, value in whole.items()}, "ahead": True}).rows)
    order = mixed.flatten().argsort()
    return {name: torch.cat([rows[name] for rows in seen])[order] for name in seen[0]}
