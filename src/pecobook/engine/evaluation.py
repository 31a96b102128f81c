"""Evaluation during training: means of metrics over held-out images, pictures, and metrics of gathered rows.

A stage in evaluation mode may return rows, one per image (codes, features). They are gathered over batches and ranks,
together with the rows of some training images if the stage compares with those. `Stage.summarise` turns the rows into
metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pecobook.data.batch import Batch
from pecobook.data.sampler import key
from pecobook.data.stream import Stream, load, to_device
from pecobook.utils.devices import widest
from pecobook.utils.distributed import gather_rows
from pecobook.utils.images import encode_picture

if TYPE_CHECKING:
    from lightning_fabric import Fabric


_MAX_WITHOUT_WORKERS = 2048  # images per rank


class Evaluation(NamedTuple):
    """Results of one evaluation. Metrics and rows are equal on all ranks; pictures and skipped images are not."""

    metrics: dict[str, float]
    """Names begin with `evaluation/`."""
    pictures: dict[str, Tensor]
    """Pictures of this rank's first batch."""
    rows: dict[str, Tensor]
    """Rows of all evaluated held-out images, on the host."""
    skipped: list[str]
    """Names of the images that this rank could not read."""


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
    """Evaluate a stage on held-out images, and read all of `reference` for comparison.

    Args:
        fabric: the Fabric of the run.
        model: the wrapped stage.
        stage: the stage itself.
        held_out: images to evaluate on.
        reference: training images that the stage compares with, or None.
        num_images: maximum number of held-out images to evaluate.
        batch_size: maximum number of images on a device at a time.
        seed: seed of the random numbers in the forward pass.
        workers: number of data-loading processes; none are started for a few images.
    """
    model.eval()
    options = {"batch_size": batch_size, "seed": seed, "workers": workers}
    result = _evaluate_stream(fabric, model, held_out, num_images=num_images, **options)
    metrics, skipped = average_metrics(fabric, result.metrics), result.skipped
    if result.rows:
        reference_rows: dict[str, Tensor] = {}
        if reference is not None:
            reference_result = _evaluate_stream(fabric, model, reference, num_images=len(reference), **options)
            reference_rows, skipped = reference_result.rows, skipped + reference_result.skipped
        summary = stage.summarise(result.rows, reference_rows)
        metrics |= {f"evaluation/{name}": value for name, value in summary.items()}
    return Evaluation(metrics, result.pictures, result.rows, skipped)


class _StreamResult(NamedTuple):
    metrics: dict[str, Tensor]
    rows: dict[str, Tensor]
    pictures: dict[str, Tensor]
    skipped: list[str]


def _evaluate_stream(
    fabric: Fabric, model: Any, stream: Stream, *, num_images: int, batch_size: int, seed: int, workers: int
) -> _StreamResult:
    """Return the mean metrics over this rank's images, and the rows of all ranks, on the host, one per image.

    A metric that is missing from some batches is averaged over the images of the others.

    All ranks evaluate equally many images. If the images do not divide evenly, the last ranks evaluate some images
    twice; an unreadable image is replaced by the next one. Both are marked as `repeated`: a stage leaves them out of
    its means, a batch is weighted by the number of its other images, and their rows are dropped.
    """
    metrics: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}
    pictures: dict[str, Tensor] = {}
    skipped: list[str] = []
    counted: dict[str, int] = {}  # images of all ranks with a metric
    total = 0  # images of all ranks
    share = rank_share(fabric, stream, num_images, batch_size, workers=workers, few=_MAX_WITHOUT_WORKERS)
    for number, batch in enumerate(share):
        torch.manual_seed(key(seed, 2**32 + number) >> 1)
        skipped += batch["skipped"]
        moved = to_device(batch, fabric.device)
        repeated = moved["repeated"]
        output = model(moved)
        counts = ~gather_rows(repeated)
        num_counted = int(counts.sum())
        total += num_counted
        losses = {} if output.loss is None else {"loss": output.loss}
        for name, value in {**losses, **output.metrics}.items():
            weighted = widest(value) * (~repeated).sum()
            metrics[name] = metrics.get(name, 0) + weighted
            counted[name] = counted.get(name, 0) + num_counted
        for name, value in output.rows.items():
            gathered = gather_rows(value)
            rows.setdefault(name, []).append((gathered[counts] if len(gathered) == len(counts) else gathered).cpu())
        pictures = pictures or output.pictures
    if not total:  # none of the requested images can be read
        return _StreamResult({}, {}, pictures, skipped)
    means = {  # each divided by the share of a rank, so that the mean over ranks equals the mean over images
        f"evaluation/{name}": value / (counted[name] / fabric.world_size)
        for name, value in metrics.items()
        if counted[name]
    }
    return _StreamResult(means, {name: torch.cat(parts) for name, parts in rows.items()}, pictures, skipped)


def rank_share(
    fabric: Fabric, stream: Stream, num_images: int, batch_size: int, *, workers: int, few: int
) -> Iterator[Batch]:
    """Yield this rank's batches of the first `num_images` images, on the host; all ranks get equally many.

    `repeated`, bool (B,), marks images that another rank has too, and those that replace an unreadable one. Up to `few`
    images per rank are read without worker processes.
    """
    num_images = min(num_images, len(stream))
    count = -(-num_images // fabric.world_size)
    positions = list(_rank_batches(count, batch_size, fabric.global_rank, fabric.world_size))
    wrapped = [[position % num_images for position in batch] for batch in positions]
    batches = load(stream, wrapped, workers=workers if count > few else 0)
    for places, batch in zip(positions, batches, strict=True):
        second_time = torch.tensor([position >= num_images for position in places])
        yield {**batch, "repeated": second_time | batch["replaced"]}


def _rank_batches(count: int, batch_size: int, rank: int, world_size: int) -> Iterator[list[int]]:
    """Yield batches of positions for this rank's `count` images; all ranks together read 0, 1, 2, ... in order."""
    for begin in range(0, count, batch_size):
        size = min(batch_size, count - begin)
        first = begin * world_size + rank * size
        yield list(range(first, first + size))


def average_metrics(fabric: Fabric, metrics: dict[str, Tensor]) -> dict[str, float]:
    """Return metrics () as numbers, averaged over ranks."""
    if not metrics:
        return {}
    names = sorted(metrics)
    stacked = torch.stack([metrics[name].float() for name in names])
    if fabric.world_size > 1:
        dist.all_reduce(stacked)
        stacked /= fabric.world_size
    return dict(zip(names, stacked.tolist(), strict=True))


def picture_grid(pictures: dict[str, Tensor], *, columns: int = 8) -> bytes:
    """Return one PNG with a row per name and a column for each of the first images."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    rows = [value[:columns].float().cpu().clamp(0, 1) for value in pictures.values()]
    zoom = max(1, 128 // rows[0].shape[-1])
    grid = (
        make_grid(torch.cat(rows), nrow=len(rows[0]), padding=2).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    )
    return encode_picture(to_pil_image(grid), "PNG")
