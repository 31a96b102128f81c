"""Evaluation in the middle of training: means of metrics over held-out images, pictures, and what rows of images tell.

A stage in evaluation mode may return rows, one a image (codes, features). They are gathered over batches and ranks,
beside the same rows of some training images where the stage compares with those, and the stage sums them up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pecobook.data.sampler import key
from pecobook.data.stream import Stream, load, to_device
from pecobook.utils.distributed import gather_rows

if TYPE_CHECKING:
    from lightning_fabric import Fabric


_WITHOUT_WORKERS = 2048  # images of a rank


class Evaluation(NamedTuple):
    """What one evaluation found, the same on all ranks but for the pictures."""

    metrics: dict[str, float]
    """Names begin with `evaluation/`."""
    pictures: dict[str, Tensor]
    """Of this rank's first batch."""
    rows: dict[str, Tensor]
    """Of all held-out images looked at, on the host."""
    skipped: list[str]
    """What this rank could not read."""


@torch.no_grad()
def evaluate(
    fabric: Fabric,
    model: Any,
    stage: Any,
    held_out: Stream,
    reference: Stream | None,
    *,
    num_images: int,
    batch_size: int,
    seed: int,
    workers: int = 0,
) -> Evaluation:
    """Look at held-out images, and at all of `reference`.

    Args:
        fabric: of the run.
        model: the wrapped stage.
        stage: the stage itself.
        held_out: images to evaluate on.
        reference: training images that the stage compares with; None for none.
        num_images: most held-out images looked at.
        batch_size: most images at once on a device.
        seed: of what is random in a forward pass.
        workers: data-loading processes; they are not started for a few images.
    """
    model.eval()
    how = {"batch_size": batch_size, "seed": seed, "workers": workers}
    found = _evaluate_stream(fabric, model, held_out, num_images=num_images, **how)
    metrics, skipped = average_metrics(fabric, found.metrics), found.skipped
    if found.rows:
        known: dict[str, Tensor] = {}
        if reference is not None:
            compared = _evaluate_stream(fabric, model, reference, num_images=len(reference), **how)
            known, skipped = compared.rows, skipped + compared.skipped
        metrics |= {f"evaluation/{name}": value for name, value in stage.summarise(found.rows, known).items()}
    return Evaluation(metrics, found.pictures, found.rows, skipped)


class _StreamResult(NamedTuple):
    metrics: dict[str, Tensor]
    rows: dict[str, Tensor]
    pictures: dict[str, Tensor]
    skipped: list[str]


def _evaluate_stream(
    fabric: Fabric, model: Any, stream: Stream, *, num_images: int, batch_size: int, seed: int, workers: int
) -> _StreamResult:
    """Means of metrics over this rank's images; rows of all ranks, on the host, each image once.

    Ranks look at equally many images, so where they do not divide evenly the last ones look at some a second time, as
    they do where the next image stands in for one that cannot be read: a stage finds these marked as `repeated` and
    leaves them out of its means, a batch weighs as many images as are left, and their rows are dropped.
    """
    most = min(num_images, len(stream))
    count = -(-most // fabric.world_size)  # of each rank
    places = list(_batches(count, batch_size, fabric.global_rank, fabric.world_size))
    batches = [[place % most for place in batch] for batch in places]
    metrics: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}
    pictures: dict[str, Tensor] = {}
    skipped: list[str] = []
    counted = 0  # images of all ranks
    workers = workers if count > _WITHOUT_WORKERS else 0
    for number, batch in enumerate(load(stream, batches, workers=workers, pin=False)):
        torch.manual_seed(key(seed, 2**32 + number) >> 1)
        skipped += batch["skipped"]
        repeated = (torch.tensor([place >= most for place in places[number]]) | batch["replaced"]).to(fabric.device)
        output = model({**to_device(batch, fabric.device), "repeated": repeated})
        kept = ~gather_rows(repeated)
        counted += int(kept.sum())
        losses = {} if output.loss is None else {"loss": output.loss}
        for name, value in {**losses, **output.metrics}.items():
            weighed = value.double() * (~repeated).sum()
            metrics[f"evaluation/{name}"] = metrics.get(f"evaluation/{name}", 0) + weighed
        for name, value in output.rows.items():
            whole = gather_rows(value)
            rows.setdefault(name, []).append((whole[kept] if len(whole) == len(kept) else whole).cpu())
        pictures = pictures or output.pictures
    if not counted:  # the few images asked for are all unreadable
        return _StreamResult({}, {}, pictures, skipped)
    share = counted / fabric.world_size  # so that the mean over ranks is that over images
    means = {name: value / share for name, value in metrics.items()}
    return _StreamResult(means, {name: torch.cat(parts) for name, parts in rows.items()}, pictures, skipped)


def _batches(count: int, batch_size: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """Positions of this rank's `count` images; together the ranks read positions 0, 1, 2, ... in order."""
    for begin in range(0, count, batch_size):
        size = min(batch_size, count - begin)
        first = begin * world_size + rank * size
        yield list(range(first, first + size))


def average_metrics(fabric: Fabric, metrics: dict[str, Tensor]) -> dict[str, float]:
    """Metrics () as numbers, averaged over ranks."""
    if not metrics:
        return {}
    names = sorted(metrics)
    stacked = torch.stack([metrics[name].float() for name in names])
    if fabric.world_size > 1:
        dist.all_reduce(stacked)
        stacked /= fabric.world_size
    return dict(zip(names, stacked.tolist(), strict=True))
