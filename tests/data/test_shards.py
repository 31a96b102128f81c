"""Tar shards: members, splits, the cached index, and damaged archives."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest

from pecobook.data import shards
from pecobook.data.decode import BadImage
from pecobook.data.images import open_all_splits, open_images
from pecobook.errors import DataError
from tests.data.sources import labels, make_tar, names, png, samples, values


def test_shards_of_a_folder_and_of_patterns(tmp_path: Path) -> None:
    for shard in range(12):
        make_tar(tmp_path / "s" / f"x-{shard:03}.tar", samples([2 * shard, 2 * shard + 1]))
    for source in (tmp_path / "s", tmp_path / "s" / "*.tar", tmp_path / "s" / "x-{000..011}.tar"):
        splits = open_images(str(source))
        assert sorted(values(splits.train) + values(splits.evaluation)) == list(range(24))
        assert splits.train.classes == ("8", "9", "10")
        assert labels(splits.evaluation) == [str(value % 3 + 8) for value in values(splits.evaluation)]
    assert splits.train.identify(0).endswith(f"x-000.tar/{values(splits.train)[0]:04}.png")
    few = open_images(str(tmp_path / "s" / "x-{003,00[45]}.tar"))
    assert sorted(values(few.train) + values(few.evaluation)) == [6, 7, 8, 9, 10, 11]
    for folder, number in (("train", 0), ("train", 1), ("train", 2), ("test", 3)):
        (tmp_path / "s" / folder).mkdir(exist_ok=True)
        (tmp_path / "s" / f"x-{number:03}.tar").rename(tmp_path / "s" / folder / f"{number}.tar")
    assert open_images(str(tmp_path / "s" / "{train,test}" / "*.tar")).evaluation_name == "test"
    with pytest.raises(DataError, match=r"3 of the 5 files do not exist; the first is '.*x-012.tar'"):
        open_images(str(tmp_path / "s" / "x-{010..014}.tar"))


def test_shards_with_splits(tmp_path: Path) -> None:
    make_tar(tmp_path / "img-train-0.tar", samples([0, 1]))
    make_tar(tmp_path / "img-train-1.tar", samples([2]))
    make_tar(tmp_path / "img-val-0.tar", samples([4, 5]))
    splits = open_images(str(tmp_path))
    assert splits.evaluation_name == "validation"
    assert (values(splits.train), values(splits.evaluation)) == ([0, 1, 2], [4, 5])
    assert labels(splits.evaluation) == ["9", "10"]


def test_shard_members(tmp_path: Path) -> None:
    members = [
        ("a/1.png", png(1)),
        ("a/1.json", json.dumps({"label": "cat"}).encode()),
        ("a/1.seg.png", png(200)),
        ("a/._2.png", b"resource fork"),
        ("a/2.PNG", png(2)),
        ("a/2.json", json.dumps({"label": "dog"}).encode()),
        ("a/2.txt", b"a dog"),
    ]
    splits = open_images(str(make_tar(tmp_path / "x.tar", members)))
    labelled = {
        (value, label)
        for source in (splits.train, splits.evaluation)
        for value, label in zip(values(source), labels(source) or [], strict=True)
    }
    assert labelled == {(1, "cat"), (2, "dog")}
    dotted = [("my.photo.1.jpg", png(1)), ("my.photo.2.jpg", png(2))]
    assert len(open_images(str(make_tar(tmp_path / "y.tar", dotted))).train) == 1


def test_shard_index_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PECOBOOK_CACHE", str(tmp_path / "cache"))
    path = make_tar(tmp_path / "x.tar", samples(range(4)))
    first = open_images(str(path))
    (cached,) = (tmp_path / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(shards, "make_index", lambda *_: pytest.fail("the index was made reopened"))
        reopened = open_images(str(path))
    assert names(reopened.train) == names(first.train)
    assert reopened.train.fingerprint == first.train.fingerprint
    cached.write_bytes(b"damaged")
    assert names(open_images(str(path)).train) == names(first.train)
    make_tar(path, samples(range(7)))
    changed = open_images(str(path))
    assert sorted(values(changed.train) + values(changed.evaluation)) == list(range(7))
    monkeypatch.setenv("PECOBOOK_CACHE", str(path / "not a folder"))
    assert len(open_images(str(path)).train) == 6


def test_many_shards_do_not_exhaust_file_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_MAX_OPEN", 2)
    for shard in range(6):
        make_tar(tmp_path / f"{shard}.tar", samples([shard]))
    train = open_images(str(tmp_path)).train
    before = len(list(Path("/dev/fd").iterdir()))
    assert len(values(train)) == 5
    assert len(list(Path("/dev/fd").iterdir())) == before + 2
    del train
    assert len(list(Path("/dev/fd").iterdir())) == before


def test_shard_errors(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"this is no tar file" * 100)
    with pytest.raises(DataError, match="cannot be read as a tar file"):
        open_images(str(tmp_path))
    make_tar(tmp_path / "x.tar", [("a.txt", b"a")])
    with pytest.raises(DataError, match="no images in 1 tar files"):
        open_images(str(tmp_path))


def test_a_member_of_40_gb_is_not_read(tmp_path: Path) -> None:
    member = tarfile.TarInfo("large.png")
    member.size = 40 * 10**9
    with (tmp_path / "a.tar").open("wb") as sparse:
        sparse.write(member.tobuf(tarfile.GNU_FORMAT))
        sparse.truncate(512 + member.size + 1024)
    (source,) = open_all_splits(str(tmp_path / "a.tar"))
    with pytest.raises(BadImage, match=r"a\.tar/large\.png: 40,000,000,000 bytes are more than 1,073,741,824"):
        source.read(0)


def test_truncated_shard(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", samples(range(4)))
    splits = open_images(str(path))
    os.truncate(path, 600)
    with pytest.raises(BadImage, match="too early"):
        splits.train.read(len(splits.train) - 1)
