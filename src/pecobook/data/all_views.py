"""All named views of every image, read in order, for `pecobook tokenize`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pecobook.data.decode import BadImage
from pecobook.data.loading import Batches
from pecobook.data.named_views import NamedViews
from pecobook.data.source import Splits
from pecobook.data.stream import Stream, collate


class _AllViews:
    """All views of an image for a DataLoader: maps (split, image) to the samples of the stream, or to the error."""

    def __init__(self, views: NamedViews, splits: Splits, num_views: int) -> None:
        self.streams = {
            "train": (Stream(splits.train, views.train, views.seed), num_views),
            "evaluation": (Stream(splits.evaluation, views.evaluation, 0), 1),
        }

    def __getitem__(self, item: tuple[str, int]) -> list[dict[str, Any]] | BadImage:
        split, index = item
        stream, num_views = self.streams[split]
        try:
            return stream.views(index, range(num_views))
        except BadImage as error:  # pre-training skips the image too
            return error


def _collate(samples: list[list[dict[str, Any]] | BadImage]) -> dict[str, Any]:
    """Returns the batch of all views, and under "unread" the error of each unreadable image by its place.

    The worker stacks the views because every tensor on its way to the main process keeps a file open.
    """
    views = [view for sample in samples if isinstance(sample, list) for view in sample]
    unread = {place: sample for place, sample in enumerate(samples) if not isinstance(sample, list)}
    return {"count": len(samples), "unread": unread, **(collate(views) if views else {})}


def read_all_views(
    views: NamedViews,
    splits: Splits,
    items: list[tuple[str, int]],
    *,
    num_views: int,
    images_per_batch: int,
    workers: int,
    pin: bool,
) -> Iterator[dict[str, Any]]:
    """Return the batches of `items`, pairs of split and image, in order; no batch contains images of both splits."""
    batches: list[list[tuple[str, int]]] = []
    for item in items:
        if not batches or len(batches[-1]) == images_per_batch or batches[-1][0][0] != item[0]:
            batches.append([])
        batches[-1].append(item)
    return Batches(_AllViews(views, splits, num_views), batches, collate=_collate, workers=workers, pin=pin)
