"""Sources of a million images, and of ten million, of which only the names exist: what a process holds for each image.

The ceilings are those of "Speed of reading" in docs/data.md.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pecobook.commands.check.survey import _Repeats
from pecobook.data import record, shards
from pecobook.data.images import open_images
from pecobook.data.source import Splits
from pecobook.data.tar_index import IndexedImage, ShardIndex
from tests import forked

_FOLDER = 10_000  # images of a class, or of a shard
_SPARE = 2**25
"""Bytes that do not depend on the number of images."""


class _Entry:
    """An entry of a folder, as os.scandir gives it."""

    def __init__(self, name: bytes, *, is_folder: bool) -> None:
        self.name, self._is_folder = name, is_folder

    def is_file(self, **_: bool) -> bool:
        return not self._is_folder

    def is_dir(self, **_: bool) -> bool:
        return self._is_folder


class _Scan:
    def __init__(self, entries: Iterator[_Entry]) -> None:
        self._entries = entries

    def __enter__(self) -> Iterator[_Entry]:
        return self._entries

    def __exit__(self, *_: object) -> None:
        pass


def scan(folder: bytes, root: Path, count: int, of_folder: int) -> _Scan:
    """List a folder with `of_folder` images in each of its folders, or in itself; names have 30 letters."""
    top = os.fsencode(root)
    if folder.rstrip(b"/") == top and of_folder < count:
        return _Scan(_Entry(b"n%08d" % number, is_folder=True) for number in range(count // of_folder))
    length = 15 if of_folder < count else 25
    numbers = (number * 7919 % of_folder for number in range(of_folder))  # in no order
    return _Scan(_Entry(b"%0*d.JPEG" % (length, number), is_folder=False) for number in numbers)


def make_index(shard: Path) -> ShardIndex:
    """Return the index of a shard that has no bytes."""
    number = int(shard.stem)
    images = [IndexedImage(f"{number:06}/{n:018}.jpg", 512 * n, 500, str(number)) for n in range(_FOLDER)]
    return ShardIndex(images)


class _Gauge:
    """The most memory that was held, in bytes an image beyond what was held at the beginning."""

    def __init__(self, count: int) -> None:
        self.count, self.peaks, self.kept = count, dict[str, float](), dict[str, float]()
        self.begin()

    def begin(self) -> None:
        self._before, self._own = self._status("VmRSS"), self._anonymous()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here on

    def note(self, name: str) -> None:
        self.kept[name] = (self._status("VmRSS") - self._before - _SPARE) / self.count
        self.peaks[name] = (self._status("VmHWM") - self._before - _SPARE) / self.count
        Path("/proc/self/clear_refs").write_text("5")

    def own(self) -> int:
        """Return the bytes that the process now holds for itself, in no file, beyond those at the beginning."""
        return self._anonymous() - self._own

    @staticmethod
    def _anonymous() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))

    @staticmethod
    def _status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def open_folder(root: Path, count: int, of_folder: int) -> Splits:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.scandir", lambda folder: scan(folder, root, count, of_folder))
        return open_images(str(root))


def open_shards(root: Path, count: int) -> Splits:
    for number in range(count // _FOLDER):
        (root / f"{number:06}.tar").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "index_shard", make_index)
        return open_images(f"{root}/*.tar")


def open_tables(root: Path, count: int) -> Splits:
    rows = min(count, 100_000)
    columns = {"image": pa.array([b"x"] * rows), "label": pa.array(np.arange(rows) % 1000)}
    for number in range(count // rows):
        pq.write_table(pa.table(columns), root / f"{number}.parquet")
    return open_images(f"{root}/*.parquet")


def opened(kind: str, root: Path, count: int) -> Splits:
    root.mkdir(exist_ok=True)
    if kind == "shards":
        return open_shards(root, count)
    if kind == "tables":
        return open_tables(root, count)
    return open_folder(root, count, count if kind == "flat folder" else min(_FOLDER, count // 2))


def measure(words: list[str]) -> None:
    kind, count, root = words[0], int(words[1]), Path(words[2])
    run = root / "run"
    run.mkdir()
    small = opened(kind, root / "small", 2 * _FOLDER)  # so that all that is imported is
    record.take(small).write(run)
    record.compare(record.take(small), record.read(run) or record.take(small))
    gauge = _Gauge(count)
    splits = opened(kind, root / "large", count)
    gauge.note("open")
    assert len(splits.train.fingerprint) == 16
    gauge.note("fingerprint")
    own = gauge.own()
    if "folder" in kind:
        now = record.take(splits)
        gauge.note("record")
        now.write(run)
        gauge.note("record, written")
        before = record.read(run)
        assert before is not None
        assert record.compare(before, now).differences == ()
        gauge.note("record, compared")
        names = pa.concat_arrays([now.names[: count // 2], now.names[count // 2 + 1 :]])
        other = record.Record(names, now.sizes[1:], now.times[1:], {})
        assert record.compare(before, other).differences[0].startswith("1 removed")
        gauge.note("record, compared with another")
        del now, before, names, other
    numbers = np.arange(count, dtype=np.uint64) + np.uint64(1)
    assert _Repeats(splits, numbers[count // 10 :], numbers[: count // 10]).text().startswith("in training 0")
    gauge.note("check")
    (root / "found.json").write_text(json.dumps({"peaks": gauge.peaks, "kept": gauge.kept, "own": {"bytes": own}}))


# What stays in a process, and the most that it holds meanwhile, in bytes an image whose name has 30 letters.
KEPT = {"class folders": 80, "flat folder": 70, "shards": 90, "tables": 90}
OPEN = {"class folders": 110, "flat folder": 120, "shards": 250, "tables": 130}
RECORD = {"record": 200, "record, written": 200, "record, compared": 350, "record, compared with another": 400}
CHECK = 150
OWN = 2**27
"""Bytes that a process keeps for itself, whatever the number of images: what is larger is mapped from the disk."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("count", [10**6, pytest.param(10**7, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", list(KEPT))
def test_a_process_holds_few_bytes_an_image(kind: str, count: int, tmp_path: Path) -> None:
    caches = {"HF_DATASETS_CACHE": str(tmp_path / "hf"), "PECOBOOK_CACHE": str(tmp_path / "cache")}
    forked.run(
        [kind, str(count), str(tmp_path)], tmp_path / "log", environment={**os.environ, **caches}, program=measure
    )
    found: dict[str, dict[str, float]] = json.loads((tmp_path / "found.json").read_text())
    limits = {"open": OPEN[kind], "fingerprint": OPEN[kind], **(RECORD if "folder" in kind else {"check": CHECK})}
    assert found["kept"]["fingerprint"] < KEPT[kind], found
    assert found["own"]["bytes"] < OWN, found
    assert {name: peak for name, peak in found["peaks"].items() if peak > limits.get(name, peak)} == {}
