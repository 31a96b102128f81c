"""What servers of images refuse, odd names of files, and a cache that cannot be written."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from pecobook.data import remote, remote_cache
from pecobook.data.images import open_images
from pecobook.data.remote import RemotePath
from pecobook.data.remote_refusals import RefusedError
from pecobook.errors import ConfigError, DataError
from pecobook.utils import printer
from tests.data.sources import make_parquet, make_tar, png, samples, values
from tests.data.web_server import Server, make_shards, quick, server

__all__ = ["quick", "server"]  # the fixtures


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (401, "'{url}' cannot be read: the server answers 401 Unauthorized. 'Files on other machines' in docs/data.md"),
        (403, "'{url}' cannot be read: the server answers 403 Forbidden. 'Files on other machines' in docs/data.md"),
        (404, "'{url}' does not exist."),
        (410, "'{url}' does not exist."),
        (416, "'{url}' has become shorter since it was opened"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_refusal_of_a_web_server_is_an_error_at_once(
    answer: int, text: str, first: bool, server: Server, tmp_path: Path
) -> None:
    make_shards(tmp_path / "served")
    url = f"{server.url}/train-000.tar"
    server.trouble |= {"HEAD": answer} if first else {"next": [str(answer)]}
    with pytest.raises(RefusedError) as caught:
        open_images(url)
    assert text.format(url=url) in str(caught.value)
    assert len(server.requests) == 2  # a HEAD and a GET that ask for the size, or a HEAD and a range


def test_a_server_that_is_away_at_the_first_question_is_asked_again(server: Server, tmp_path: Path) -> None:
    make_shards(tmp_path / "served")
    local = values(open_images(str(tmp_path / "served" / "train-000.tar")).train)
    server.trouble |= {"first": [503, 503, 500, 429]}
    assert values(open_images(f"{server.url}/train-000.tar").train) == local
    assert server.trouble["first"] == []


def test_a_busy_server_is_asked_again_when_it_says(server: Server, tmp_path: Path) -> None:
    make_shards(tmp_path / "served")
    local = values(open_images(str(tmp_path / "served" / "train-000.tar")).train)
    server.trouble["next"] = ["wait 1"]
    began = time.monotonic()
    assert values(open_images(f"{server.url}/train-000.tar").train) == local
    assert time.monotonic() - began > 1
    server.trouble["next"] = ["wait 3600"]
    with pytest.raises(DataError, match=r"the server answers 429 Too Many Requests, and asks to wait 3600 s\.$"):
        open_images(f"{server.url}/train-001.tar")


def test_a_file_that_is_replaced_is_known_by_its_time_where_the_server_has_no_etag(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_tar(tmp_path / "served" / "x.tar", samples(range(8)))
    server.trouble["no ETag"] = True
    url = f"{server.url}/x.tar"
    assert sorted(values(open_images(url).train)) == sorted(values(open_images(str(file)).train))
    make_tar(file, samples(range(8, 16)))  # as many bytes
    os.utime(file, (time.time() + 60,) * 2)
    monkeypatch.setattr(remote, "_infos", {})
    assert min(values(open_images(url).train)) >= 8


def test_addresses_that_lead_in_a_circle_are_refused_at_once(server: Server) -> None:
    with pytest.raises(
        RefusedError, match=r"/loop/x\.tar' cannot be read: the server sends from address to address\.$"
    ):
        open_images(f"{server.url}/loop/x.tar")
    assert len(server.requests) < 50


def test_a_server_that_stays_away_is_no_file_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE", 0.1)
    with pytest.raises(DataError, match=r"'http://127.0.0.1:9/x.tar' cannot be read: Cannot connect to host"):
        open_images("http://127.0.0.1:9/x.tar")
    with pytest.raises(DataError, match="cannot be read"):  # and no answer that there is no such file
        RemotePath("http://127.0.0.1:9/classes.txt").is_file()


def test_a_signed_address_is_the_file_without_its_signature(server: Server, tmp_path: Path) -> None:
    make_shards(tmp_path / "served")
    make_parquet(tmp_path / "served" / "set")
    for name in ("train-000.tar", "set/data.parquet"):
        plain = open_images(f"{server.url}/{name}").train
        pixels, before = values(plain), server.count()
        signed = open_images(f"{server.url}/{name}?X-Signature=a//b%2Fc&Expires=60").train
        assert any("?X-Signature=a//b/c&Expires=60" in unquote(path) for path, _ in server.requests)
        assert (signed.fingerprint, values(signed)) == (plain.fingerprint, pixels)
        assert signed.identify(0) == plain.identify(0)
        assert server.count() - before <= 2  # the images came from the cache; labels of parquet are not kept there
    server.trouble["HEAD"] = 403
    with pytest.raises(RefusedError, match=r"train-001\.tar' cannot be read: .* 403 .*the address may have expired"):
        open_images(f"{server.url}/train-001.tar?X-Signature=ab")


@pytest.mark.parametrize("name", ["a b.tar", "ü 日本.tar", "a+b&c=d.tar", "100% [1].tar", "x.tar?.tar"])
def test_names_are_those_of_the_files(name: str, tmp_path: Path) -> None:
    make_tar(tmp_path / "set" / name, samples(range(20)))
    (tmp_path / "set" / "README.md").write_text("about")
    here, there = open_images(str(tmp_path / "set")), open_images(f"file://{tmp_path}/set")
    assert values(there.train) == values(here.train)
    assert there.train.identify(0) == f"file://{here.train.identify(0)}"
    assert there.left_out == here.left_out == {"extension .md": 1}


def test_a_pattern_counts_files_of_other_kinds(tmp_path: Path) -> None:
    make_shards(tmp_path)
    (tmp_path / "train-000.tar.idx").write_text("about")
    splits = open_images(f"file://{tmp_path}/train-*")
    assert splits.left_out == {"extension .idx": 1}
    make_parquet(tmp_path)
    with pytest.raises(DataError, match=r"holds both \.tar and \.parquet files"):
        open_images(f"file://{tmp_path}")


def test_a_cache_that_cannot_be_written_costs_requests_and_a_warning(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(tmp_path / "served")
    make_parquet(tmp_path / "served" / "set")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("PECOBOOK_CACHE", str(tmp_path / "file"))
    for name in ("train-000.tar", "set/data.parquet"):
        monkeypatch.setattr(printer, "_said", set())
        capsys.readouterr()
        assert values(open_images(f"{server.url}/{name}").train) == values(
            open_images(str(tmp_path / "served" / name)).train
        )
        said = capsys.readouterr().err
        assert said.count("cannot be written (Not a directory)") == 1, said
        assert "PECOBOOK_CACHE names another place" in said


def test_a_row_group_larger_than_the_cache_is_read(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_parquet(tmp_path / "served" / "set")
    monkeypatch.setattr(remote_cache, "_SCAN_BYTES", 0)
    monkeypatch.setenv(remote_cache.LIMIT_VARIABLE, "0.000000001")
    there = open_images(f"{server.url}/set/data.parquet").train
    assert values(there) == values(open_images(str(tmp_path / "served" / "set")).train)
    assert not list((tmp_path / "cache" / "remote").glob("*/*.arrow"))


def test_cache__what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "remote" / "0123"
    folder.mkdir(parents=True)
    old, new, block = folder / ".7-1.tmp", folder / ".8-2.tmp", folder / "00000001"
    for file in (old, new, block):
        file.write_bytes(b"data")
    os.utime(old, (time.time() - 7200,) * 2)
    remote_cache.remove_unused()
    assert sorted(folder.iterdir()) == [new, block]


def test_a_server_may_send_elsewhere(server: Server, tmp_path: Path) -> None:
    make_shards(tmp_path / "served")
    make_parquet(tmp_path / "served" / "set")
    for name in ("train-000.tar", "set/data.parquet"):
        moved, there = open_images(f"{server.url}/moved/{name}").train, open_images(f"{server.url}/{name}").train
        assert values(moved) == values(there)
        assert moved.identify(0).startswith(f"{server.url}/moved/{name}")


@pytest.mark.parametrize("source", ["https://", "hf://", "s3://", "s3:///x", "gs:///", "file://", "file:///"])
def test_an_address_without_a_place_is_refused_at_once(source: str) -> None:
    with pytest.raises(DataError, match=f"--data '{source}' names no server, bucket or folder"):
        open_images(source)


def test_extensions_in_capitals_are_those_of_this_machine(server: Server, tmp_path: Path) -> None:
    make_tar(tmp_path / "served" / "TRAIN.TAR", samples(range(20)))
    here = values(open_images(f"{tmp_path}/served/TRAIN.TAR").train)
    for source in (f"{server.url}/TRAIN.TAR", f"file://{tmp_path}/served", f"file://{tmp_path}/served/*.TAR"):
        assert values(open_images(source).train) == here


@pytest.mark.parametrize("source", ["{a,zero}.tar", "zero.tar"])
def test_a_shard_without_a_byte_is_named(source: str, server: Server, tmp_path: Path) -> None:
    make_tar(tmp_path / "served" / "a.tar", samples(range(10)))
    (tmp_path / "served" / "zero.tar").touch()
    for place in (server.url, tmp_path / "served"):
        with pytest.raises(DataError, match=r"zero\.tar' cannot be read as a tar file: empty file"):
            open_images(f"{place}/{source}")


def test_keys_may_come_again_in_other_shards_and_be_of_any_script(server: Server, tmp_path: Path) -> None:
    odd = [("猫/ünï-ß.png", png(3)), ("猫/ünï-ß.cls", "犬".encode()), ("0000.png", png(4)), ("0000.cls", b"chat")]
    make_tar(tmp_path / "served" / "odd.tar", odd)
    make_tar(tmp_path / "served" / "again.tar", odd)
    there, here = (open_images(f"{place}/{{odd,again}}.tar") for place in (server.url, tmp_path / "served"))
    assert sorted(values(there.train) + values(there.evaluation)) == [3, 3, 4, 4]
    assert values(there.train) == values(here.train)
    assert there.train.classes == here.train.classes == ("chat", "犬")


@pytest.mark.parametrize("package", ["gcsfs", "adlfs"])
def test_a_library_that_is_missing_is_named(package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    protocol = {"gcsfs": "gs", "adlfs": "az"}[package]
    with pytest.raises(ConfigError, match=f"addresses with {protocol}:// need one more package: pip install {package}"):
        open_images(f"{protocol}://bucket/x")


def test_a_revision_of_the_hub_is_part_of_the_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's file system is replaced by one of this machine, which sees the same paths."""
    asked: list[str] = []

    class Hub:
        def info(self, url: str) -> dict[str, Any]:
            asked.append(url)
            return {"type": "file", "size": local(url).stat().st_size, "blob_id": "1"}

        def cat_file(self, url: str, start: int, end: int) -> bytes:
            return local(url).read_bytes()[start:end]

        def glob(self, url: str) -> list[str]:
            assert url == f"{base}/*.parquet"
            return [f"{base.removeprefix('hf://')}/data.parquet"]

    def local(url: str) -> Path:
        if url != f"{base}/data.parquet":
            raise FileNotFoundError(url)
        return tmp_path / "data.parquet"

    make_parquet(tmp_path, 40)
    monkeypatch.setattr(remote, "_system", lambda _url: Hub())
    for revision in ("v1.0", "refs%2Fconvert%2Fparquet", "0123456789abcdef"):
        base = f"hf://datasets/owner/name@{revision}/default/train"
        for source in (f"{base}/data.parquet", f"{base}/*.parquet"):
            train = open_images(source).train
            assert values(train) == values(open_images(str(tmp_path / "data.parquet")).train)
            assert train.identify(0).startswith(f"{base}/data.parquet row ")
    assert set(asked) == {url for url in asked if "@" in url}
