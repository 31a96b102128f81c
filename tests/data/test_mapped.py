"""Columns in mapped files hold the values that they held in memory, and leave nothing behind."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pecobook.data import mapped, record
from pecobook.data.images import open_images
from pecobook.data.source import ImageSource, Splits
from pecobook.utils import printer
from tests.data.sources import labels, make_parquet, make_tar, names, samples, values


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Map columns of any size, into a cache of this test."""
    monkeypatch.setenv("PECOBOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mapped, "LEAST_BYTES", 1)
    monkeypatch.setattr(printer, "_said", set())
    monkeypatch.setattr(mapped, "_MOUNTS", Path("/nowhere"))  # the tests themselves may run in memory
    return tmp_path / "cache" / "columns"


_COLUMNS = {
    "integers": np.arange(1000, dtype=np.uint32)[::3],
    "texts": pa.array(["a", "", "ü"] * 9, pa.large_string())[1:],
    "paths": pa.chunked_array([pa.array([b"a/\xff", b"b"], pa.large_binary()), pa.array([b"c"], pa.large_binary())]),
}


@pytest.mark.parametrize("kind", list(_COLUMNS))
def test_a_mapped_column_holds_the_values(kind: str, cache: Path) -> None:
    column = _COLUMNS[kind]
    found = mapped.mapped(column)
    assert found is not column
    for other in (found, pickle.loads(pickle.dumps(found))):
        assert type(other) is type(column)
        assert other.tolist() == column.tolist() if kind == "integers" else other.equals(column)
    assert getattr(found, "dtype", None) == getattr(column, "dtype", None)
    assert list(cache.iterdir()) == []  # the file has no name, so nothing remains of a process that is killed


def _make(kind: str, folder: Path, class_folder: Path) -> str:
    if kind == "folder":
        return str(class_folder)
    if kind == "table":
        return str(make_parquet(folder))
    return str(make_tar(folder / "x.tar", samples(range(20))))


def _facts(source: ImageSource) -> list[object]:
    return [source.fingerprint, names(source), labels(source), values(source), names(source.subset([0, 0]))]


@pytest.mark.parametrize("kind", ["folder", "table", "shards"])
def test_a_source_is_the_same_with_mapped_columns(
    kind: str, cache: Path, tmp_path: Path, class_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = _make(kind, tmp_path, class_folder)
    mapping = open_images(source)
    pickled: Splits = pickle.loads(pickle.dumps(mapping))  # as for a data-loading process that is not forked
    monkeypatch.setattr(mapped, "LEAST_BYTES", 2**60)
    holding = open_images(source)
    assert cache.is_dir()
    for splits in (mapping, pickled):
        assert _facts(splits.train) == _facts(holding.train)
        assert _facts(splits.evaluation) == _facts(holding.evaluation)
        assert record.compare(record.take(holding), record.take(splits)).differences == ()


def _is_a_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    cache.parent.write_text("")
    return "Not a directory"


def _is_full(cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 9))
    return "its disk has little room"


def _is_memory(cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    cache.mkdir(parents=True)
    device = cache.stat().st_dev
    mounts = cache.parent / "mounts"
    mounts.write_text(f"36 35 {os.major(device)}:{os.minor(device)} / /x rw shared:1 - tmpfs tmpfs rw\n")
    monkeypatch.setattr(mapped, "_MOUNTS", mounts)
    return "it lies in memory"


@pytest.mark.parametrize("prepare", [_is_a_file, _is_full, _is_memory])
def test_without_a_place_a_column_stays_in_memory_and_a_line_says_so(
    prepare: object, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(prepare)
    reason = prepare(cache, monkeypatch)
    column = np.arange(9)
    assert mapped.mapped(column) is column
    assert mapped.mapped(column) is column
    said = capsys.readouterr()
    assert (said.out + said.err).count(f"cannot take them ({reason})") == 1, said
