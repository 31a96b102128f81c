"""The training stream and its loader: positions in, batches out, nothing remembered.

`Stream[p]` is the sample at position `p` (see `pecobook.data.sampler`); a DataLoader reads it in any number of
processes. An image that cannot be read is replaced by the next one in the permutation, and reported with the batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pecobook.data.images import BadImage, ImageSource
from pecobook.data.sampler import key, permute
from pecobook.errors import DataError

# A view function maps (uint8 image (C, H, W), key of this view) to named tensors.
ViewFunction: TypeAlias = Callable[[Tensor, int], dict[str, Tensor]]
# What goes with a sample beside its view: (number of the image, epoch) to named tensors.
Companion: TypeAlias = Callable[[int, int], dict[str, Tensor]]
Batch: TypeAlias = dict[str, Any]

_GIVE_UP_AFTER = 100


class Stream(Dataset[dict[str, Any]]):
    """Samples by position.

    A sample holds what `view` and `companion` return, `index` (the image's number), `label` when the source has labels,
    and `skipped` (what could not be read on the way, as text). Keys of views: (seed, image index, view number), so a
    view has a name; the view number is the epoch, or, with `num_views`, the epoch modulo that.
    """

    def __init__(
        self,
        source: ImageSource,
        view: ViewFunction,
        seed: int,
        *,
        companion: Companion | None = None,
        num_views: int = 0,
    ) -> None:
        self.source, self.view, self.seed = source, view, seed
        self.companion, self.num_views = companion, num_views

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> dict[str, Any]:
        size = len(self.source)
        epoch, place = divmod(position, size)
        skipped: list[str] = []
        for _ in range(min(size, _GIVE_UP_AFTER)):
            index = permute(place, size, key(self.seed, epoch))
            try:
                image = self.source.read(index)
            except BadImage as error:
                skipped.append(str(error))
                place = (place + 1) % size
                continue
            number = epoch % self.num_views if self.num_views else epoch
            sample: dict[str, Any] = dict(self.view(image, key(self.seed, index, number)))
            if self.companion is not None:
                sample |= self.companion(index, epoch)
            sample["index"] = torch.tensor(index)
            if self.source.labels is not None:
                sample["label"] = torch.tensor(int(self.source.labels[index]))
            return {**sample, "skipped": skipped}
        raise DataError(f"{len(skipped)} images in a row cannot be read, the last is {skipped[-1]}.")


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Stack tensors; join what was skipped."""
    batch: Batch = {"skipped": [name for sample in samples for name in sample["skipped"]]}
    for name in samples[0]:
        if name != "skipped":
            batch[name] = torch.stack([sample[name] for sample in samples])
    return batch


def default_workers(devices: int) -> int:
    """Data-loading processes for each device: the cores shared out, at most 16, none where only one is to spare."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cores // max(devices, 1) - 1
    return min(share, 16) if share > 1 else 0


def load(stream: Stream, positions: Sequence[list[int]], *, workers: int, pin: bool) -> Iterator[Batch]:
    """Batches of this rank, in order, of the positions that each list names."""
    if len(positions) == 0:
        return iter(())
    loader: DataLoader[dict[str, Any]] = DataLoader(
        stream,
        batch_sampler=positions,
        num_workers=workers,
        pin_memory=pin,
        collate_fn=collate,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_stand_apart,
    )
    return iter(loader)


def _stand_apart(_worker: int) -> None:
    """Leave the process group: its Ctrl-C or SIGTERM is for the trainer, which saves before it ends its workers."""
    os.setpgid(0, 0)


def read_all(source: ImageSource, size: int, *, limit: int | None = None) -> tuple[Tensor, Tensor | None, list[str]]:
    """Read a source (or the first `limit` images of a fixed permutation of it) as central crops.

    Returns:
        images uint8 (N, C, size, size), labels int64 (N,) or None, and what could not be read.
    """
    from pecobook.data.views import center_crop

    count = len(source) if limit is None else min(limit, len(source))
    order = range(count) if count == len(source) else [permute(i, len(source), key(0, 1)) for i in range(count)]
    images, labels, skipped = [], [], []
    for index in order:
        try:
            images.append(center_crop(source.read(index), size))
        except BadImage as error:
            skipped.append(str(error))
            continue
        if source.labels is not None:
            labels.append(int(source.labels[index]))
    if not images:
        raise DataError(f"None of the {count} images of '{source.name}' can be read; the first: {skipped[0]}.")
    return torch.stack(images), torch.tensor(labels) if source.labels is not None else None, skipped
