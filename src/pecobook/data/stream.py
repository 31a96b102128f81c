"""The training stream and its loader: positions in, batches out, nothing remembered.

`Stream[p]` is the sample at position `p` (see `pecobook.data.sampler`); a DataLoader reads it in any number of
processes. An image that cannot be read is replaced by the next one in the permutation, and reported with the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pecobook.data.batch import Batch
from pecobook.data.decode import BadImage
from pecobook.data.loading import Batches
from pecobook.data.sampler import fixed_permutation, key, permute
from pecobook.data.source import ImageSource
from pecobook.data.views import center_crop, shortest_side
from pecobook.errors import DataError
from pecobook.utils.devices import cores

# A view function maps (uint8 image (C, H, W), key of this view) to tensors under names of `Batch`; where the source has
# more of an image than its pixels, (image, mask or boxes, key). A list of tensors marks what differs in shape between
# images.
ViewFunction: TypeAlias = Callable[..., dict[str, Any]]
# What goes with a sample beside its view: (number of the image, epoch) to named tensors. It may raise BadImage too.
Companion: TypeAlias = Callable[[int, int], dict[str, Tensor]]

_GIVE_UP_AFTER = 100


class Stream(Dataset[dict[str, Any]]):
    """Samples by position.

    A sample holds what `view` and `companion` return, `index` (the image's number), `label` when the source has labels,
    `replaced` (bool, whether it replaces an image that cannot be read) and `skipped` (what could not be read on the
    way, as text). Keys of views: (seed, image index, view number), so a view has a name; the view number is the epoch,
    or, with `num_views`, the epoch modulo that.
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
        self.shortest = shortest_side(view)
        self.failure = ""
        """A sentence on a data-loading process that was killed."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> dict[str, Any]:
        size = len(self.source)
        epoch, place = divmod(position, size)
        skipped: list[str] = []
        for _ in range(min(size, _GIVE_UP_AFTER)):
            index = permute(place, size, key(self.seed, epoch))
            number = epoch % self.num_views if self.num_views else epoch
            try:
                beside = {} if self.companion is None else self.companion(index, epoch)
                (view,) = self.views(index, [number])
            except BadImage as error:
                skipped.append(str(error))
                place = (place + 1) % size
                continue
            sample: dict[str, Any] = {**view, **beside}
            sample["index"] = torch.tensor(index)
            if self.source.labels is not None:
                sample["label"] = torch.tensor(int(self.source.labels[index]))
            return {**sample, "replaced": torch.tensor(bool(skipped)), "skipped": skipped}
        raise DataError(f"{len(skipped)} images in a row cannot be read, the last is {skipped[-1]}.")

    def views(self, index: int, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Returns the views `numbers` of image `index`, which is read once. Raises BadImage."""
        contents = (self.source.read(index, self.shortest),) if self.shortest else self.source.sample(index)
        return [self.view(*contents, key(self.seed, index, number)) for number in numbers]


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Stack tensors; join lists: what was skipped, and tensors of different shapes."""
    batch: dict[str, Any] = {"skipped": []}
    for name, first in samples[0].items():
        parts = [sample[name] for sample in samples]
        batch[name] = [item for part in parts for item in part] if isinstance(first, list) else torch.stack(parts)
    return cast("Batch", batch)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """All tensors of a batch on a device, without what was skipped."""

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [item.to(device, non_blocking=True) for item in value]
        return value.to(device, non_blocking=True)

    return cast("Batch", {name: move(value) for name, value in batch.items() if name != "skipped"})


def default_workers(devices: int) -> int:
    """Data-loading processes for each device: the cores shared out, at most 16, none where only one is to spare."""
    share = len(cores()) // max(devices, 1) - 1
    return min(share, 16) if share > 1 else 0


def load(stream: Stream, positions: Sequence[list[int]], *, workers: int, pin: bool) -> Iterator[Batch]:
    """Batches of this rank, in order, of the positions that each list names.

    Where a data-loading process is killed, `stream.failure` says so, and this process reads the further batches.
    """

    def note(sentence: str) -> None:
        stream.failure = sentence

    return Batches(stream, positions, collate=collate, workers=workers, pin=pin, prefetch=4, on_failure=note)


class _CentralCrops(Dataset[dict[str, Any]]):
    """Central crops of images by number; one that cannot be read has no image, only its name in `skipped`."""

    def __init__(self, source: ImageSource, size: int, share: float = 1.0) -> None:
        self.source, self.size, self.share = source, size, share

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            image = self.source.read(index, math.ceil(4 * self.size / self.share))
            sample: dict[str, Any] = {"image": center_crop(image, self.size, share=self.share), "skipped": []}
        except BadImage as error:
            return {"skipped": [str(error)]}
        if self.source.labels is not None:
            sample["label"] = torch.tensor(int(self.source.labels[index]))
        return sample


def _collate_whole(samples: list[dict[str, Any]]) -> Batch:
    whole = collate([sample for sample in samples if "image" in sample] or [{"skipped": []}])
    return {**whole, "skipped": [name for sample in samples for name in sample["skipped"]]}


def central_crops(
    source: ImageSource, size: int, *, limit: int | None = None, batch_size: int = 128, share: float = 1.0
) -> Iterator[tuple[int, Batch]]:
    """Read a source once (or the first `limit` images of a fixed permutation of it), without what cannot be read.

    `share` is the side of the crop, as a share of the image's shorter side.

    Yields:
        how many images were asked for so far, and the batch: image uint8 (B, C, size, size), label int64 (B,) when the
        source has labels, and what was skipped, alone where nothing of a batch could be read.

    Raises:
        DataError: none of the images can be read.
    """
    count = len(source) if limit is None else min(limit, len(source))
    order = list(range(count))
    if count < len(source):
        order = [fixed_permutation(i, len(source)) for i in order]
    loader = Batches(
        _CentralCrops(source, size, share),
        [order[start : start + batch_size] for start in range(0, count, batch_size)],
        workers=default_workers(1) if count > 2048 else 0,
        collate=_collate_whole,
        flag="",
    )
    read, first = 0, ""
    for number, batch in enumerate(loader, start=1):
        first = first or next(iter(batch["skipped"]), "")
        read += len(batch.get("image", ()))
        yield min(number * batch_size, count), batch
    if not read:
        raise DataError(f"None of the {count} images of '{source.name}' can be read; the first: {first}.")


def read_all(source: ImageSource, size: int, *, limit: int | None = None) -> tuple[Tensor, Tensor | None, list[str]]:
    """All that `central_crops` yields, at once.

    Returns:
        images uint8 (N, C, size, size), labels int64 (N,) or None, and what could not be read.
    """
    batches = [batch for _, batch in central_crops(source, size, limit=limit)]
    skipped = [name for batch in batches for name in batch["skipped"]]
    whole = [batch for batch in batches if "image" in batch]
    labels = torch.cat([batch["label"] for batch in whole]) if source.labels is not None else None
    return torch.cat([batch["image"] for batch in whole]), labels, skipped
