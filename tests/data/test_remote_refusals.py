"""What servers of images refuse, odd names of files, and a cache that cannot be written."""

from __future__ import annotations

import os
import time
from pathlib import Path
from urllib.parse import unquote

import pytest

from pecobook.data import remote, remote_cache
from pecobook.data.images import open_images
from pecobook.data.remote import RemotePath
from pecobook.data.remote_refusals import RefusedError
from pecobook.errors import DataError
from tests.data.sources import make_parquet, make_tar, samples, values
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
        monkeypatch.setattr(remote_cache, "_is_said", False)
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
