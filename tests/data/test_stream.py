"""The stream: what a run reads is the same for any workers, ranks and accumulation, bad images included."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import BatchSampler

from pecobook.data.batch import Batch
from pecobook.data.decode import BadImage
from pecobook.data.images import open_images
from pecobook.data.loading import Parts
from pecobook.data.sampler import BatchPositions, key, permute, splitmix64_array
from pecobook.data.source import ImageSource, Store, hold_out
from pecobook.data.stream import Numbers, Stream, _Items, collate, default_workers, load, read_all
from pecobook.data.views import random_crop
from pecobook.errors import DataError

CROP = partial(random_crop, size=8, min_area=0.2)


class Squares(Store):
    """A store of squares, image i of the value i, some of them unreadable."""

    def __init__(self, number: int, bad: frozenset[int] = frozenset()) -> None:
        self.number, self.bad = number, bad

    def __len__(self) -> int:
        return self.number

    def read(self, row: int, shortest: int = 0) -> Tensor:  # noqa: ARG002
        if row in self.bad:
            raise BadImage(str(row), "bad")
        return torch.full((3, 5, 6), row, dtype=torch.uint8)

    def identify(self, row: int) -> str:
        return str(row)

    def digest(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> str:
        return str(rows)


def squares(number: int, bad: frozenset[int] = frozenset(), *, labelled: bool = True) -> ImageSource:
    labels = np.arange(number, dtype=np.int64) % 3 if labelled else None
    classes = ("a", "b", "c") if labelled else None
    return ImageSource(Squares(number, bad), name="squares", split="train", classes=classes, labels=labels)


def view(image: Tensor, view_key: int) -> dict[str, Tensor]:
    return {"image": CROP(image, view_key=view_key), "key": torch.tensor(view_key >> 1)}


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def read(
    stream: Stream,
    *,
    steps: tuple[int, int] = (0, 6),
    batch: int = 8,
    micro: int = 8,
    ranks: int = 1,
    rank: int = 0,
    workers: int = 0,
) -> list[Batch]:
    positions = BatchPositions(
        start_step=steps[0], stop_step=steps[1], batch_size=batch, micro_batch_size=micro, rank=rank, world_size=ranks
    )
    return list(load(stream, positions, workers=workers))


def assert_equal(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert a["skipped"] == b["skipped"]
        for name in a.keys() - {"skipped"}:
            assert torch.equal(a[name], b[name]), name


def joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One batch of several, in order."""
    whole: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "skipped"}
    return whole | {"skipped": [text for part in parts for text in part["skipped"]]}


def test_stream__holds_view_index_and_label(images: Path) -> None:
    source = open_images(str(images)).train
    assert source.labels is not None
    stream = Stream(source, view, seed=3)
    size = len(source)
    assert len(stream) == size
    for position in (0, 1, size - 1, size, 5 * size + 2):
        epoch, place = divmod(position, size)
        index = permute(place, size, key(3, epoch))
        sample = stream[position]
        assert sample["index"] == index
        assert sample["label"] == source.labels[index]
        assert sample["key"] == key(3, index, epoch) >> 1
        assert torch.equal(sample["image"], CROP(source.read(index), view_key=key(3, index, epoch)))
        assert sample["skipped"] == []


def test_stream__has_no_label_where_there_is_none() -> None:
    assert "label" not in Stream(squares(4, labelled=False), view, seed=0)[0]


def test_stream__an_epoch_is_every_image_once_in_a_new_order_with_new_views() -> None:
    stream = Stream(squares(20), view, seed=0)
    epochs = [[stream[position] for position in range(20 * epoch, 20 * epoch + 20)] for epoch in range(3)]
    orders = [[int(sample["index"]) for sample in epoch] for epoch in epochs]
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert len({int(sample["key"]) for epoch in epochs for sample in epoch}) == 60
    assert orders[0] != [int(Stream(squares(20), view, seed=1)[i]["index"]) for i in range(20)]


def test_stream__windows_change_the_order_alone() -> None:
    whole, windows = (Stream(squares(40), view, seed=2, window=window) for window in (0, 10))
    one, other = (
        {int(s["index"]): int(s["key"]) for s in map(stream.__getitem__, range(40))} for stream in (whole, windows)
    )
    assert one == other  # every image once, with the same view
    assert list(one) != list(other)


@pytest.mark.parametrize("bad", [frozenset[int](), frozenset({2, 3, 11})], ids=["good", "some bad"])
def test_load__is_the_same_for_any_workers(bad: frozenset[int]) -> None:
    stream = Stream(squares(13, bad), view, seed=0)
    alone = read(stream)
    assert [len(batch["index"]) for batch in alone] == [8] * 6
    assert_equal(alone, read(stream, workers=2))


def test_load__two_ranks_read_the_halves_of_one() -> None:
    stream = Stream(squares(13, frozenset({4})), view, seed=0)
    halves = [read(stream, micro=4, ranks=2, rank=rank) for rank in (0, 1)]
    assert_equal(read(stream), [joined([left, right]) for left, right in zip(*halves, strict=True)])


def test_load__accumulated_micro_batches_are_the_batch() -> None:
    stream = Stream(squares(13), view, seed=0)
    whole = read(stream)
    micro = read(stream, micro=2)
    assert_equal(whole, [joined(micro[i : i + 4]) for i in range(0, len(micro), 4)])
    # With ranks too: micro-batch by micro-batch, and in each rank by rank.
    ranks = [read(stream, micro=2, ranks=2, rank=rank) for rank in (0, 1)]
    in_order = [part for pair in zip(*ranks, strict=True) for part in pair]
    assert_equal(micro, in_order)


def test_load__resumes_anywhere() -> None:
    stream = Stream(squares(13, frozenset({1})), view, seed=0)
    assert_equal(read(stream)[4:], read(stream, steps=(4, 6)))
    assert read(stream, steps=(6, 6)) == []


def test_stream__replaces_a_bad_image_by_the_next_and_reports_it() -> None:
    good, source = squares(10), squares(10, frozenset({3, 7}))
    whole, holed = Stream(good, view, seed=5), Stream(source, view, seed=5)
    order = [int(whole[position]["index"]) for position in range(20)]
    for position in range(20):
        epoch = position // 10
        expected, passed = position, []
        while order[expected] in (3, 7):
            passed.append(f"{order[expected]}: bad")
            expected = epoch * 10 + (expected + 1) % 10
        sample = holed[position]
        assert sample["index"] == order[expected]
        assert sample["skipped"] == passed
        assert sample["label"] == order[expected] % 3
        assert torch.equal(sample["image"], whole[expected]["image"])


@pytest.mark.parametrize("number", [3, 500])
def test_stream__gives_up_when_all_are_bad(number: int) -> None:
    stream = Stream(squares(number, frozenset(range(number))), view, seed=0)
    with pytest.raises(DataError, match=f"{min(number, 100)} images in a row cannot be read, the last is .*: bad"):
        stream[0]


def test_load__gives_up_in_a_worker_too() -> None:
    stream = Stream(squares(3, frozenset(range(3))), view, seed=0)
    try:
        stream[0]
    except DataError:
        wrapped = pickle.loads(pickle.dumps(ExceptionWrapper(where="in a worker")))  # type: ignore[no-untyped-call]
    with pytest.raises(DataError, match="3 images in a row cannot be read"):  # as the DataLoader hands it on
        wrapped.reraise()


def test_stream__an_image_whose_companion_is_missing_is_replaced_as_one_that_cannot_be_read() -> None:
    def companion(image: int, epoch: int) -> dict[str, Tensor]:
        if image in (2, 3):
            raise BadImage(str(image), "bad")
        return {"beside": torch.tensor([image, epoch])}

    lacking = Stream(squares(7), view, seed=0, companion=companion)
    unread = Stream(squares(7, frozenset({2, 3})), view, seed=0, companion=companion)
    for position in range(14):
        assert_equal([lacking[position]], [unread[position]])
        assert lacking[position]["beside"].tolist() == [int(lacking[position]["index"]), position // 7]


def test_stream__repeats_show_an_image_in_as_many_views_side_by_side() -> None:
    source = squares(7)
    plain, stream = Stream(source, view, seed=3), Stream(source, view, seed=3, repeats=3)
    samples = [stream[position] for position in range(42)]
    assert [int(sample["index"]) for sample in samples] == [int(plain[place // 3]["index"]) for place in range(42)]
    for place, sample in enumerate(samples):
        number = place // 21 * 3 + place % 3
        assert sample["key"] == key(3, int(sample["index"]), number) >> 1
    assert len({int(sample["key"]) for sample in samples}) == 42


def test_collate__stacks_tensors_and_joins_what_was_skipped() -> None:
    one, other = torch.tensor([1, 2]), torch.tensor([3, 4])
    batch = collate([{"size": one, "skipped": ["x"]}, {"size": other, "skipped": ["y", "z"]}])
    assert batch["size"].tolist() == [[1, 2], [3, 4]]
    assert batch["skipped"] == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("cores", "devices", "workers"), [(1, 1, 0), (2, 1, 0), (3, 1, 2), (16, 8, 0), (64, 8, 7), (200, 1, 16), (4, 0, 3)]
)
def test_default_workers__shares_the_cores_out(
    monkeypatch: pytest.MonkeyPatch, cores: int, devices: int, workers: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert default_workers(devices) == workers
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert default_workers(devices) == (workers if workers < 16 else 64)


def test_batches_of_ten_million_images_take_no_memory_of_their_own() -> None:
    size = 10**7
    starts = range(0, size // 2, 8192)
    ranges = [(split, range(start, start + 8192)) for split in ("train", "evaluation") for start in starts]
    numbers = Numbers([numbers for _, numbers in ranges])
    positions = BatchPositions(
        start_step=0, stop_step=size // 4096, batch_size=4096, micro_batch_size=4096, rank=0, world_size=1
    )
    batches = (_Items(ranges, 250), BatchSampler(numbers, 4096, drop_last=False), Parts(positions, 50))
    before = resident_bytes()
    counts = [sum(map(len, places)) for places in batches]
    assert resident_bytes() - before < 2**24  # a list of them would take 360 MB, and one of pairs a GB
    assert counts == [len(numbers), len(numbers), len(positions) * 4096]


def test_hold_out__takes_four_bytes_an_image_and_eight_meanwhile() -> None:
    def smallest(count: int) -> list[int]:
        hashes = splitmix64_array(np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        return sorted(np.argsort(hashes, kind="stable")[: max(1, count // 10)].tolist())

    for count in (2, 9, 10, 1000, 12_345):
        splits = hold_out(squares(count, labelled=False))
        assert splits.evaluation.rows.tolist() == smallest(count)
        assert sorted([*splits.train.rows.tolist(), *splits.evaluation.rows.tolist()]) == list(range(count))
    source, count = squares(3 * 10**6, labelled=False), 3 * 10**6
    tracemalloc.start()
    try:
        splits = hold_out(source)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(splits.train) == count - count // 10
    assert kept < 4.1 * count
    assert peak < 8 * count + 2**26  # hashes of a million images at a time


def test_items__hold_one_split_each_and_every_image_once() -> None:
    ranges = [("train", range(5)), ("train", range(5, 9)), ("evaluation", range(3))]
    batches = list(_Items(ranges, 4))
    assert [len(batch) for batch in batches] == [4, 4, 1, 3]
    assert [item for batch in batches for item in batch] == [(split, n) for split, part in ranges for n in part]
    assert all(len({split for split, _ in batch}) == 1 for batch in batches)
    assert list(Numbers([part for _, part in ranges])) == [*range(9), *range(3)]
    assert Numbers([range(5), range(5, 9)])[6] == 6


def test_read_all__reads_everything_in_order_and_lists_the_bad() -> None:
    images, labels, skipped = read_all(squares(7, frozenset({2})), 4)
    assert images.shape == (6, 3, 4, 4)
    assert images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [0, 1, 3, 4, 5, 6]
    assert labels is not None
    assert labels.tolist() == [0, 1, 0, 1, 2, 0]
    assert skipped == ["2: bad"]


def test_read_all__limits_to_a_fixed_choice() -> None:
    images, labels, _ = read_all(squares(200, labelled=False), 4, limit=50)
    values = images[:, 0, 0, 0].tolist()
    assert labels is None
    assert len(set(values)) == 50
    assert max(values) > 150
    assert values == read_all(squares(200), 4, limit=50)[0][:, 0, 0, 0].tolist()
    assert len(read_all(squares(7), 4, limit=50)[0]) == 7


def test_read_all__refuses_when_nothing_can_be_read() -> None:
    with pytest.raises(DataError, match="None of the 2 images of 'squares' can be read; the first: 0: bad"):
        read_all(squares(2, frozenset({0, 1})), 4)
