"""Processes that read from other machines: killed in the middle of an epoch, two with one cache, and without room."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pecobook.data import remote, remote_cache
from pecobook.data.images import open_images
from pecobook.errors import DataError
from pecobook.utils import printer
from tests import forked
from tests.data.sources import make_parquet, make_tar, samples, values
from tests.data.web_server import Server, bucket, make_shards, quick, server
from tests.runs import export_bytes, logged, losses, small_flags

__all__ = ["bucket", "quick", "server"]  # the fixtures


def small_blocks() -> None:
    """Let a process read remote files in small parts, as it reads a large set."""
    remote.BLOCK, remote._FIRST_PAUSE = 5000, 0.01


def small_cache() -> None:
    """Let parts be removed from the cache and requested again, as where a set is larger than the disk."""
    small_blocks()
    remote_cache._SCAN_BYTES = 1


def die_in_the_fourth_step() -> None:
    """Kill the process with half of a part of the cache written."""
    small_cache()
    replace, metrics = Path.replace, Path(os.environ["METRICS"])

    def write_half(path: Path, target: Path) -> Path:
        is_part = path.name.endswith(".tmp") and "remote" in path.parts
        if is_part and metrics.exists() and metrics.read_text().count("\n") >= 3:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    Path.replace = write_half  # type: ignore[assignment, method-assign]


def upload(bucket: Any, images: Path, folder: Path, kind: str) -> str:
    """Put the images into the bucket as shards or tables; return the address."""
    files = sorted(images.rglob("*.png"))
    for number in range(4):
        part = [(f"{file.parent.name}-{file.name}", file.read_bytes()) for file in files[6 * number : 6 * number + 6]]
        if kind == "tar":
            file = make_tar(folder / f"{number}.tar", part)
        else:
            folder.mkdir(exist_ok=True)
            file = folder / f"{number}.parquet"
            pq.write_table(pa.table({"image": [data for _, data in part]}), file, row_group_size=1)
        bucket.upload_file(str(file), "images", f"{kind}/{file.name}")
    return f"s3://images/{kind}"


def as_it_is(cache: Path) -> None:
    pass


def emptied(cache: Path) -> None:
    shutil.rmtree(cache)


def cut_short(cache: Path) -> None:
    """Leave half of each part, as after a power cut."""
    for file in (cache / "remote").glob("*/*"):
        os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("kind", ["tar", pytest.param("parquet", marks=pytest.mark.slow)])
def test_a_run_that_is_killed_while_it_reads_ends_as_if_it_was_not(
    kind: str, bucket: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, cache, log = upload(bucket, images, tmp_path / "set", kind), tmp_path / "run", tmp_path / "c", tmp_path
    words = ["codebook", "tiny", *small_flags("codebook", data=source, save_every=1)]
    monkeypatch.setenv("PECOBOOK_CACHE", str(tmp_path / "straight-cache"))
    forked.run([*words, "--out", str(tmp_path / "straight")], log / "straight.txt", prepare=small_blocks)
    monkeypatch.setenv("PECOBOOK_CACHE", str(cache))
    monkeypatch.setenv("METRICS", str(out / "metrics.jsonl"))
    monkeypatch.setenv(remote_cache.LIMIT_VARIABLE, "0.00006")  # half of the images
    process = forked.start([*words, "--out", str(out)], log / "killed.txt", prepare=die_in_the_fourth_step)
    process.join(300)
    assert process.exitcode == -signal.SIGKILL, (log / "killed.txt").read_text()
    assert len(list((cache / "remote").glob("*/.*.tmp"))) == 1
    assert 3 <= len(logged(out)) < 8
    for name in (out, cache):
        shutil.copytree(name, f"{name}-left")
    for state in (as_it_is, emptied, cut_short):
        for name in (out, cache):
            shutil.rmtree(name, ignore_errors=True)
            shutil.copytree(f"{name}-left", name)
        state(cache)
        forked.run([*words, "--out", str(out), "--resume"], log / f"{state.__name__}.txt", prepare=small_cache)
        assert losses(out) == losses(tmp_path / "straight"), state.__name__
        assert export_bytes(out) == export_bytes(tmp_path / "straight"), state.__name__
        assert "skipped" not in (log / f"{state.__name__}.txt").read_text()


# ----------------------------------------------------------------------------------------------------------- one cache


def read_for_long(words: list[str]) -> None:
    """Read all images of a source some times in one order, and write a hash of what was read."""
    source, step, result = words[0], int(words[1]), Path(words[2])
    train, found = open_images(source).train, []
    for _ in range(4):
        digests = {index: hashlib.sha256(train.content(index)).hexdigest() for index in range(len(train))[::step]}
        found.append([digests[index] for index in range(len(train))])
    result.write_text(json.dumps(found))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_two_processes_read_through_a_cache_that_is_too_small(
    kind: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path / "served")
    make_parquet(tmp_path / "served", 60)
    name = "train-{000..002}.tar" if kind == "tar" else "data.parquet"
    train = open_images(str(tmp_path / "served" / name)).train
    expected = [hashlib.sha256(train.content(index)).hexdigest() for index in range(len(train))]
    monkeypatch.setenv(remote_cache.LIMIT_VARIABLE, "0.00002")  # four blocks
    processes = [
        forked.start(
            [f"{server.url}/{name}", str(step), str(tmp_path / f"{step}.json")],
            tmp_path / f"{step}.txt",
            prepare=small_cache,
            program=read_for_long,
        )
        for step in (1, -1)
    ]
    for process in processes:
        process.join(300)
    for step in (1, -1):
        said = (tmp_path / f"{step}.txt").read_text()
        assert said == "", said
        assert json.loads((tmp_path / f"{step}.json").read_text()) == [expected] * 4
    kept = sum(file.stat().st_size for file in (tmp_path / "cache" / "remote").glob("*/[!.]*"))
    assert 0 < kept <= 20_000 + 2 * 5000
    assert not list((tmp_path / "cache" / "remote").glob("*/.*.tmp"))


# -------------------------------------------------------------------------------------------------------------- no room


def no_room(write: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that writes half and fails for want of room."""

    def write_half(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return write_half


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(printer, "_said", set())
    monkeypatch.setattr(Path, "write_bytes", no_room(Path.write_bytes))

    class Writer:
        def __init__(self, sink: Any, _schema: Any) -> None:
            self.sink = sink

        def __enter__(self) -> Writer:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def write_table(self, _table: Any) -> None:
            self.sink.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pa.ipc, "new_file", Writer)
    yield
    monkeypatch.undo()


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_full_disk_loses_nothing_and_is_said_once(
    kind: str, server: Server, tmp_path: Path, full_disk: None, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "tar":
        make_tar(tmp_path / "served" / "data.tar", samples(range(40)))
    else:
        make_parquet(tmp_path / "served", 40)
    there = open_images(f"{server.url}/data.{kind}").train
    before = server.count()
    assert values(there) == values(open_images(str(tmp_path / "served" / f"data.{kind}")).train)
    said = capsys.readouterr().err
    assert said.count("cannot be written (No space left on device), so what is read is requested each time") == 1, said
    assert not [file for file in (tmp_path / "cache" / "remote").rglob("*") if file.suffix in (".tmp", ".arrow")]
    if kind == "tar":  # a part is requested once for an image, though it cannot be kept
        assert server.count() - before <= len(there) + 10


# ------------------------------------------------------------------------------------------------- files that change


def test_a_file_that_is_replaced_meanwhile_is_named(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tar(tmp_path / "served" / "data.tar", samples(range(40)))
    there = open_images(f"{server.url}/data.tar").train
    monkeypatch.setattr(remote, "_ASKED_AGAIN", -1.0)
    shutil.rmtree(tmp_path / "cache")
    assert there.read(0).shape == (3, 4, 6)  # asked again, and the same
    shutil.rmtree(tmp_path / "cache")
    make_tar(tmp_path / "served" / "data.tar", samples(range(1, 41)))
    with pytest.raises(DataError, match=r"data\.tar' has been replaced since it was opened"):
        there.read(0)
