"""The training stream and its loader: positions in, batches out, no state.

`Stream[p]` is the sample at position `p` (see `pecobook.data.sampler`); a DataLoader reads it in any number of
processes. An unreadable image is replaced by the next one in the permutation, and reported with the batch.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Dataset

from pecobook.data.batch import Batch
from pecobook.data.decode import BadImage
from pecobook.data.loading import Batches
from pecobook.data.sampler import fixed_permutation, key, permute_windows
from pecobook.data.source import ImageSource, Splits
from pecobook.data.views import NamedViews, center_crop, shortest_side
from pecobook.errors import DataError
from pecobook.utils.devices import cores

# A view function maps (uint8 image (C, H, W), key of this view) to tensors under names of `Batch`; if the source has
# more than the pixels, (image, mask or boxes, key). A list of tensors marks what differs in shape between images.
ViewFunction: TypeAlias = Callable[..., dict[str, Any]]
# What a sample holds besides its view: maps (number of image, of view) to named tensors. It may raise BadImage.
Companion: TypeAlias = Callable[[int, int], dict[str, Tensor]]

_GIVE_UP_AFTER = 100


class Stream(Dataset[dict[str, Any]]):
    """Samples by position.

    A sample contains the results of `view` and `companion`, `index` (the image's number), `label` if the source has
    labels, `replaced` (bool, whether it replaces an unreadable image) and `skipped` (a text on what could not be read
    before it). Keys of views: (seed, image index, view number), so a view has a name; the view number is the epoch or,
    with `num_views`, the epoch modulo that. With `repeats`, that many neighbouring positions stand for as many views of
    one image, so an epoch takes that many times as many positions. `window` is that of `permute_windows`.
    """

    def __init__(
        self,
        source: ImageSource,
        view: ViewFunction,
        seed: int,
        *,
        companion: Companion | None = None,
        num_views: int = 0,
        repeats: int = 1,
        window: int = 0,
    ) -> None:
        self.source, self.view, self.seed, self.window = source, view, seed, window
        self.companion, self.num_views, self.repeats = companion, num_views, repeats
        self.shortest = shortest_side(view)
        self.failure = ""
        """A sentence on a data-loading process that was killed."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> dict[str, Any]:
        size = len(self.source)
        position, repeat = divmod(position, self.repeats)
        epoch, place = divmod(position, size)
        skipped: list[str] = []
        for _ in range(min(size, _GIVE_UP_AFTER)):
            index = permute_windows(place, size, self.window, key(self.seed, epoch))
            number = epoch * self.repeats + repeat
            try:
                beside = {} if self.companion is None else self.companion(index, number)
                (view,) = self.views(index, [number % self.num_views if self.num_views else number])
            except BadImage as error:
                skipped.append(str(error))
                place = (place + 1) % size
                continue
            sample: dict[str, Any] = {**view, **beside}
            sample["index"] = torch.tensor(index)
            if self.source.labels is not None:
                sample["label"] = torch.tensor(int(self.source.labels[index]))
            return {**sample, "replaced": torch.tensor(bool(skipped)), "skipped": skipped}
        raise DataError(f"{len(skipped)} {self.source.unit} in a row cannot be read, the last is {skipped[-1]}.")

    def views(self, index: int, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """Returns the views `numbers` of image `index`, which is read once. Raises BadImage."""
        contents = self.source.sample(index, self.shortest)
        return [self.view(*contents, key(self.seed, index, number)) for number in numbers]


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Stack tensors; concatenate lists: what was skipped, and tensors of different shapes."""
    batch: dict[str, Any] = {"skipped": []}
    for name, first in samples[0].items():
        parts = [sample[name] for sample in samples]
        batch[name] = [item for part in parts for item in part] if isinstance(first, list) else torch.stack(parts)
    return cast("Batch", batch)


def join(parts: list[dict[str, Any]], device: torch.device | None = None) -> Any:
    """Join the parts of a batch, on a device if one is given; a name missing from a part adds nothing."""
    if device is not None:
        parts = [{**part, **to_device(cast("Batch", part), device)} for part in parts]
    batch: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if name in part]
        is_list = isinstance(values[0], list)
        batch[name] = [item for value in values for item in value] if is_list else torch.cat(values)
    return batch


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return all tensors of a batch on a device, without what was skipped."""

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [item.to(device, non_blocking=True) for item in value]
        return value.to(device, non_blocking=True)

    return cast("Batch", {name: move(value) for name, value in batch.items() if name != "skipped"})


def default_workers(devices: int) -> int:
    """Return the number of data-loading processes per device: a share of the cores, none if only one can be spared.

    A GPU gets at most 64. Without one, at most 16 read, since the cores also compute.
    """
    share = len(cores()) // max(devices, 1) - 1
    return min(share, 64 if torch.cuda.is_available() else 16) if share > 1 else 0


def load(
    stream: Stream, positions: Sequence[list[int]], *, workers: int, device: torch.device | None = None
) -> Iterator[Batch]:
    """Return this rank's batches, in order, for the positions in each list; those with several parts are on `device`.

    If a data-loading process is killed, `stream.failure` says so, and this process reads the remaining batches.
    """

    def note(sentence: str) -> None:
        stream.failure = sentence

    joined, pin = partial(join, device=device), device is not None and device.type == "cuda"
    return Batches(stream, positions, collate=collate, join=joined, workers=workers, pin=pin, on_failure=note)


class OrError(Dataset[Any]):
    """Maps an item to the result of `read`, or to the error of an unreadable image."""

    def __init__(self, read: Callable[[Any], Any]) -> None:
        self.read = read

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.read(item)
        except BadImage as error:
            return error


def _single(samples: list[Any]) -> Any:
    (sample,) = samples
    return sample


def read_whole(source: ImageSource, shortest: int = 0) -> Iterator[Tensor | BadImage]:
    """Read a source's images one by one, in order, at their own sizes; `shortest` as in `decode`.

    Yields:
        uint8 (3, H, W), or the reason why the image cannot be read.

    Raises:
        WorkerError: a data-loading process was killed.
    """
    return Batches(
        OrError(partial(source.read, shortest=shortest)),
        BatchSampler(range(len(source)), batch_size=1, drop_last=False),
        workers=default_workers(1) if len(source) > 256 else 0,
        collate=_single,
        join=_single,
        flag="",
    )


def _central_crop(source: ImageSource, size: int, share: float, index: int) -> dict[str, Any]:
    crop = center_crop(source.read(index, math.ceil(4 * size / share)), size, share=share)
    label = {} if source.labels is None else {"label": torch.tensor(int(source.labels[index]))}
    return {"image": crop, "index": torch.tensor(index), **label}


def _collate_crops(samples: list[dict[str, Any] | BadImage]) -> Batch:
    whole = [sample for sample in samples if not isinstance(sample, BadImage)]
    skipped = [str(sample) for sample in samples if isinstance(sample, BadImage)]
    return {**collate(whole), "skipped": skipped} if whole else {"skipped": skipped}


def read_crops(
    source: ImageSource, size: int, order: Sequence[int], *, batch_size: int, workers: int = -1, share: float = 1.0
) -> Iterator[Batch]:
    """Read central crops of the images `order`, whose side is `share` of the shorter side.

    A batch has image uint8 (B, 3, size, size), index int64 (B,), label int64 (B,) if the source has labels, and what
    was skipped, on its own if nothing in the batch could be read.
    """
    if workers < 0:
        workers = default_workers(1) if len(order) > 2048 else 0
    return Batches(
        OrError(partial(_central_crop, source, size, share)),
        BatchSampler(order, batch_size, drop_last=False),
        workers=workers,
        collate=_collate_crops,
        join=join,
        flag="",
    )


def central_crops(
    source: ImageSource, size: int, *, limit: int | None = None, batch_size: int = 128, share: float = 1.0
) -> Iterator[tuple[int, Batch]]:
    """Read a source once (or the first `limit` images of a fixed permutation of it), without unreadable images.

    `share` is the side of the crop, as a fraction of the image's shorter side.

    Yields:
        the number of images requested so far, and a batch of `read_crops`.

    Raises:
        DataError: none of the images can be read.
    """
    count = len(source) if limit is None else min(limit, len(source))
    order: Sequence[int] = range(count)
    if count < len(source):
        order = [fixed_permutation(place, len(source)) for place in order]
    read, first = 0, ""
    for number, batch in enumerate(read_crops(source, size, order, batch_size=batch_size, share=share), start=1):
        first = first or next(iter(batch["skipped"]), "")
        read += len(batch.get("image", ()))
        yield min(number * batch_size, count), batch
    if not read:
        raise DataError(f"None of the {count} images of '{source.name}' can be read; the first: {first}.")


def read_all(source: ImageSource, size: int, *, limit: int | None = None) -> tuple[Tensor, Tensor | None, list[str]]:
    """Return everything that `central_crops` yields, joined.

    Returns:
        images uint8 (N, C, size, size), labels int64 (N,) or None, and what could not be read.
    """
    images, labels, skipped, count = torch.empty(0), list[Tensor](), list[str](), 0
    for _, batch in central_crops(source, size, limit=limit):
        skipped += batch["skipped"]
        if "image" in batch:
            read = batch["image"]
            if not count:  # allocated whole: joining parts at the end would need twice the memory
                images = read.new_empty(min(limit or len(source), len(source)), *read.shape[1:])
            images[count : count + len(read)] = read
            labels += [batch["label"]] if source.labels is not None else []
            count += len(read)
    return images[:count], torch.cat(labels) if labels else None, skipped


# --------------------------------------------------------------------------------------------- all views of every image


def _all_views(streams: dict[str, tuple[Stream, int]], item: tuple[str, int]) -> list[dict[str, Any]]:
    stream, num_views = streams[item[0]]
    return stream.views(item[1], range(num_views))


def _collate_views(samples: list[list[dict[str, Any]] | BadImage]) -> dict[str, Any]:
    """Returns the batch of all views, and under "unread" the error of each image, or None.

    The worker stacks the views because every tensor on its way to the main process keeps a file open.
    """
    views = [view for sample in samples if isinstance(sample, list) for view in sample]
    unread = [sample if isinstance(sample, BadImage) else None for sample in samples]
    return {"unread": unread, **(collate(views) if views else {})}


@dataclasses.dataclass(frozen=True)
class _Items:
    """Batches of (split, image), none of which mixes the splits; no list of all is made."""

    ranges: Sequence[tuple[str, range]]
    batch_size: int

    def __iter__(self) -> Iterator[list[tuple[str, int]]]:
        for split, ranges in itertools.groupby(self.ranges, key=lambda pair: pair[0]):
            images = itertools.chain.from_iterable(numbers for _, numbers in ranges)
            while batch := [(split, image) for image in itertools.islice(images, self.batch_size)]:
                yield batch


def read_all_views(
    views: NamedViews,
    splits: Splits,
    ranges: Sequence[tuple[str, range]],
    *,
    num_views: int,
    images_per_batch: int,
    workers: int,
    pin: bool,
) -> Iterator[dict[str, Any]]:
    """Return the batches of `ranges` of images of a split, in order; no batch contains images of both splits."""
    streams = {
        "train": (Stream(splits.train, views.train, views.seed), num_views),
        "evaluation": (Stream(splits.evaluation, views.evaluation, 0), 1),
    }
    dataset, places = OrError(partial(_all_views, streams)), _Items(ranges, images_per_batch)
    return Batches(dataset, places, collate=_collate_views, join=join, workers=workers, pin=pin)


@dataclasses.dataclass(frozen=True)
class Numbers(Sequence[int]):
    """The numbers in ranges, one range after another, without a list of all."""

    ranges: Sequence[range]

    def __len__(self) -> int:
        return sum(map(len, self.ranges))

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(self.ranges)

    def __getitem__(self, place: int) -> int:  # type: ignore[override]
        return next(itertools.islice(self, place, None))
