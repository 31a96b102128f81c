"""Images on other machines: an S3 server and a web server on loopback, which drops connections and answers slowly."""

from __future__ import annotations

import os
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pecobook.data import remote, remote_cache, sampler
from pecobook.data.decode import BadImage
from pecobook.data.images import open_images
from pecobook.data.remote import RemotePath, RemoteReader, is_remote
from pecobook.data.sampler import BatchPositions
from pecobook.data.stream import Stream, load
from pecobook.data.views import random_crop
from pecobook.errors import ConfigError, DataError
from tests.data.sources import labels, make_parquet, make_tar, names, samples, values
from tests.data.web_server import Server, bucket, make_shards, quick, server

__all__ = ["bucket", "quick", "server"]  # the fixtures


def batches(source: str, *, workers: int = 0, start: int = 0, window: int = 0) -> list[dict[str, Any]]:
    view = partial(_view, size=4)
    stream = Stream(open_images(source).train, view, 0, window=window)
    positions = BatchPositions(start_step=start, stop_step=8, batch_size=16, micro_batch_size=16, rank=0, world_size=1)
    return [{**batch} for batch in load(stream, positions, workers=workers)]


def _view(image: torch.Tensor, view_key: int, *, size: int) -> dict[str, torch.Tensor]:
    return {"image": random_crop(image, size, view_key, min_area=0.5)}


def assert_same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a["skipped"] == b["skipped"] == []
        assert all(torch.equal(a[name], b[name]) for name in ("image", "index", "label"))


def test_is_remote__knows_addresses_from_paths() -> None:
    assert all(
        map(is_remote, ("s3://b/x.tar", "gs://b/x", "https://h/x.tar", "hf://datasets/a/b/x.parquet", "file:///a"))
    )
    assert not any(map(is_remote, ("hf:owner/name", "/s3/x.tar", "s3:/b/x.tar", "x.tar", "photos")))


def test_remote_path__is_a_path_with_an_address() -> None:
    assert str(RemotePath("file:///a/b.parquet")) == "file:///a/b.parquet"
    path = RemotePath("https://host:80/a/b/train-000.tar")
    assert str(path) == os.fspath(path) == "https://host:80/a/b/train-000.tar"
    assert (path.name, path.suffix, path.parent.name) == ("train-000.tar", ".tar", "b")
    assert isinstance(path.parent, RemotePath)
    again = pickle.loads(pickle.dumps(path))
    assert again == path
    assert str(again) == str(path)


def test_shards__are_those_of_local_files(server: Server, tmp_path: Path) -> None:
    make_shards(tmp_path / "served" / "set")
    here, there = (
        open_images(str(tmp_path / "served" / "set")),
        open_images(f"{server.url}/set/{{train-000,train-001,train-002,val-000}}.tar"),
    )
    for one, other in ((here.train, there.train), (here.evaluation, there.evaluation)):
        assert values(one) == values(other)
        assert labels(one) == labels(other)
        assert [name.rpartition("/set/")[2] for name in names(one)] == [
            name.rpartition("/set/")[2] for name in names(other)
        ]
    assert there.train.fingerprint == here.train.fingerprint
    assert there.train.files() is None
    assert there.train.identify(0).startswith(f"{server.url}/set/train-000.tar/")


def test_shards__each_block_is_requested_once_by_all_processes(server: Server, tmp_path: Path) -> None:
    make_shards(tmp_path / "served")
    source = f"{server.url}/train-{{000..002}}.tar"
    first = batches(source, workers=2)
    size = sum((tmp_path / "served" / f"train-{number:03}.tar").stat().st_size for number in range(3))
    spans = [request for request in server.requests if request[1]]
    assert len(spans) == len(set(spans)) <= size / 5000 + 3
    before = server.count()
    assert_same(batches(source, start=3), first[3:])  # resumed in the middle, all out of the cache
    assert server.count() == before


def test_shards__dropped_connections_and_errors_of_the_server_change_nothing(server: Server, tmp_path: Path) -> None:
    make_shards(tmp_path / "served")
    source = f"{server.url}/train-{{000..002}}.tar"
    server.trouble["next"] = ["cut", "closed", "503", "500", "", "cut", "429"] * 3
    troubled = batches(source, workers=2)
    assert server.trouble["next"] == []
    local = str(tmp_path / "served" / "train-{000..002}.tar")
    assert_same(troubled, batches(local))


def test_shards__a_slow_answer_is_asked_for_again(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path / "served")
    monkeypatch.setattr(remote, "_TIMEOUT", 0.5)
    monkeypatch.setattr(remote, "_systems", {})
    server.trouble["next"] = ["slow"]
    train = open_images(f"{server.url}/train-000.tar").train
    assert values(train) == values(open_images(str(tmp_path / "served" / "train-000.tar")).train)
    spans = [request for request in server.requests if request[1]]
    assert len(spans) == len(set(spans)) + 1


def test_shards__a_network_that_stays_away_is_an_error_and_no_bad_image(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shards(tmp_path / "served")
    train = open_images(f"{server.url}/train-{{000..002}}.tar").train
    for block in (tmp_path / "cache" / "remote").glob("*/0*"):
        block.unlink()
    server.trouble["next"] = ["closed"] * 1000
    monkeypatch.setattr(remote, "PATIENCE", 0.3)
    with pytest.raises(DataError, match=r"'http://127.*/train-000.tar' cannot be read: "):
        train.read(0)


def test_shards__what_is_not_there_is_named_at_once(server: Server, tmp_path: Path) -> None:
    make_shards(tmp_path / "served")
    with pytest.raises(DataError, match=r"train-007\.tar' does not exist"):
        open_images(f"{server.url}/train-007.tar")
    server.trouble["no ranges"] = True
    with pytest.raises(DataError, match="does not answer requests for ranges of bytes"):
        open_images(f"{server.url}/train-000.tar")


def test_cache__keeps_to_its_limit(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path / "served")
    monkeypatch.setattr(remote_cache, "_SCAN_BYTES", 1)
    monkeypatch.setenv(remote_cache.LIMIT_VARIABLE, "0.00003")  # 30,000 bytes, six blocks
    source = f"{server.url}/train-{{000..002}}.tar"
    whole = batches(source)
    size = sum(block.stat().st_size for block in (tmp_path / "cache" / "remote").glob("*/0*"))
    assert 0 < size <= 30_000
    assert_same(whole, batches(str(tmp_path / "served" / "train-{000..002}.tar")))
    monkeypatch.setenv(remote_cache.LIMIT_VARIABLE, "much")
    with pytest.raises(ConfigError, match="PECOBOOK_REMOTE_CACHE_GB is 'much'"):
        remote_cache.limit_bytes()


def test_windows__request_less_where_the_cache_is_small(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tar(tmp_path / "served" / "train-000.tar", samples(range(256)))
    monkeypatch.setattr(remote_cache, "_SCAN_BYTES", 1)
    monkeypatch.setattr(remote, "BLOCK", 20_000)  # ten images, as in a run
    monkeypatch.setattr(sampler, "_RUNS", 4)
    monkeypatch.setenv(remote_cache.LIMIT_VARIABLE, "0.00018")  # nine blocks of 26
    counts = []
    for window in (0, 40):
        train = open_images(f"{server.url}/train-000.tar").train
        stream, before = Stream(train, partial(_view, size=4), 0, window=window), server.count()
        assert sorted(int(stream[position]["index"]) for position in range(len(stream))) == list(range(len(stream)))
        counts.append(server.count() - before)
    assert counts[1] < 0.5 * counts[0], counts


def test_parquet__is_read_by_row_groups(server: Server, tmp_path: Path) -> None:
    make_parquet(tmp_path / "served" / "set", count=40)  # of five rows each
    (tmp_path / "served" / "set" / "data.parquet").rename(tmp_path / "served" / "set" / "train-0.parquet")
    make_parquet(tmp_path / "served" / "set", count=7)
    (tmp_path / "served" / "set" / "data.parquet").rename(tmp_path / "served" / "set" / "test-0.parquet")
    here = open_images(str(tmp_path / "served" / "set"))
    there = open_images(f"{server.url}/set/{{train,test}}-0.parquet")
    before = server.count()
    for one, other in ((here.train, there.train), (here.evaluation, there.evaluation)):
        assert values(one) == values(other)
        assert labels(one) == labels(other)
    assert server.count() > before
    assert there.train.files() is None
    assert there.train.num_bytes == 0
    assert there.train.identify(7) == f"{server.url}/set/train-0.parquet row 7"
    assert there.train.fingerprint == open_images(f"{server.url}/set/{{train,test}}-0.parquet").train.fingerprint
    before = server.count()
    assert values(pickle.loads(pickle.dumps(there.train))) == values(here.train)
    assert server.count() == before  # all row groups are in the cache
    server.trouble["next"] = ["cut", "closed", "503"]
    for file in (tmp_path / "cache" / "remote").glob("*/*.arrow"):
        file.write_bytes(b"")
    stream = Stream(
        open_images(f"{server.url}/set/{{train,test}}-0.parquet").train, partial(_view, size=4), 0, window=20
    )
    assert sorted(int(stream[place]["index"]) for place in range(40)) == list(range(40))


def test_parquet__of_this_machine_is_read_without_a_copy_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_parquet(tmp_path / "set", count=40)
    here = open_images(str(tmp_path / "set"))
    monkeypatch.setattr("pecobook.data.tables._load_parquet", None)
    for source in (f"file://{tmp_path}/set", f"file://{tmp_path}/set/*.parquet"):
        direct = open_images(source)
        assert not list((tmp_path / "cache").rglob("*.arrow"))  # a row group is read when an image of it is
        for one, other in ((here.train, direct.train), (here.evaluation, direct.evaluation)):
            assert labels(one) == labels(other)
    assert values(here.train) == values(direct.train)
    assert list((tmp_path / "cache").rglob("*.arrow"))
    assert direct.train.identify(0).startswith(f"file://{tmp_path}/set/data.parquet row ")


def test_parquet__paths_of_images_are_not_followed(server: Server, tmp_path: Path) -> None:
    rows = {"image": ["a.png", "b.png"]}
    (tmp_path / "served").mkdir(exist_ok=True)
    pq.write_table(pa.table(rows), tmp_path / "served" / "data.parquet")
    with pytest.raises(BadImage, match=r"row 0: a\.png is an address, not a file"):
        open_images(f"{server.url}/data.parquet").train.read(0)


def test_reader__is_a_file(server: Server, tmp_path: Path) -> None:
    data = bytes(range(256)) * 100
    (tmp_path / "served" / "x.tar").write_bytes(data)
    reader = RemoteReader(RemotePath(f"{server.url}/x.tar"))
    assert reader.read(10) == data[:10]
    assert reader.seek(-5, 2) == len(data) - 5
    assert reader.read() == data[-5:]
    assert reader.read(3) == b""
    reader.seek(4990)
    assert reader.read(12_000) == data[4990:16_990]
    assert reader.tell() == 16_990


# ------------------------------------------------------------------------------------------------------------------ S3


def test_s3__shards_of_a_folder_and_of_a_pattern(bucket: Any, tmp_path: Path) -> None:
    make_shards(tmp_path / "set")
    for file in sorted((tmp_path / "set").iterdir()):
        bucket.upload_file(str(file), "images", f"set/{file.name}")
    local = batches(str(tmp_path / "set"))
    assert_same(local, batches("s3://images/set", workers=2))
    assert_same(batches(str(tmp_path / "set" / "train-*.tar")), batches("s3://images/set/train-*.tar"))
    with pytest.raises(DataError, match=r"has no \.tar and no \.parquet files|does not exist"):
        open_images("s3://images/other")


def test_s3__a_refusal_names_the_guide(bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DataError, match=r"'s3://images/x\.tar' cannot be read: .*how to give credentials"):
        open_images("s3://images/x.tar")


def test_s3__parquet(bucket: Any, tmp_path: Path) -> None:
    make_parquet(tmp_path / "set")
    bucket.upload_file(str(tmp_path / "set" / "data.parquet"), "images", "table/data.parquet")
    there, here = open_images("s3://images/table"), open_images(str(tmp_path / "set"))
    assert values(there.train) == values(here.train)
    assert labels(there.train) == labels(here.train)
