"""Tar shards: members, splits, the cached index, and damaged archives."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pecobook.data import shards
from pecobook.data.decode import BadImage
from pecobook.data.images import check_labels, open_all_splits, open_images
from pecobook.data.source import Splits
from pecobook.data.tar_index import index_shard
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


def contents(path: Path) -> tuple[list[tuple[int, str]], Splits]:
    """Return (pixel value, label) of all images, sorted."""
    splits = open_images(str(path))
    pairs = [
        (value, label)
        for source in (splits.train, splits.evaluation)
        for value, label in zip(values(source), [*(labels(source) or [""] * len(source))], strict=True)
    ]
    return sorted(pairs, key=lambda pair: pair[0]), splits


def sample(key: str, value: int, label: str) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", png(value)), (f"{key}.cls", label.encode())]


def test_joined_archives_keep_their_own_labels(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", sample("0", 1, "cat") + sample("1", 2, "dog"))
    make_tar(tmp_path / "b.tar", sample("0", 3, "dog") + sample("1", 4, "cat"))
    joined = tmp_path / "joined"
    joined.mkdir()
    (joined / "x.tar").write_bytes((tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes())
    assert contents(joined)[0] == [(1, "cat"), (2, "dog"), (3, "dog"), (4, "cat")]
    # `tar -A` leaves no mark between the two archives
    members = sample("0", 1, "cat") + sample("1", 2, "dog") + sample("0", 3, "dog") + sample("1", 4, "cat")
    assert contents(make_tar(tmp_path / "appended.tar", members))[0] == contents(joined)[0]


def test_a_damaged_header_costs_one_member(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", [member for n in range(4) for member in sample(str(n), n, "ab"[n % 2])])
    data = bytearray(path.read_bytes())
    position = data.index(b"2.png")
    data[position + 148] ^= 1  # the checksum
    path.write_bytes(data)
    pairs, splits = contents(path)
    assert pairs == [(0, "a"), (1, "b"), (3, "b")]
    assert splits.left_out == {"damaged header": 1, "label without an image": 1}
    assert splits.notes == (f"{path} is damaged at byte {position:,}: 1,024 bytes are skipped.",)
    assert open_images(str(path)).notes == splits.notes  # from the cache


def test_a_member_cut_short(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", [member for n in range(4) for member in sample(str(n), n, "ab"[n % 2])])
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"3.png") + 512 + 30])
    pairs, splits = contents(path)
    assert pairs == [(0, "a"), (1, "b"), (2, "a")]
    assert splits.left_out == {"cut short": 1}
    assert splits.notes == (f"{path} ends {len(png(3)) - 30} bytes too early, inside '3.png', which is left out.",)
    path.write_bytes(data[: data.index(b"3.png")])
    assert contents(path)[1].notes == (f"{path} has no end mark, so it may be cut short.",)


@pytest.mark.parametrize("removed", [0, 512, 600, 1300, 2000])
def test_an_archive_behind_one_that_was_cut(tmp_path: Path, removed: int) -> None:
    first = make_tar(
        tmp_path / "a.tar", [*sample("0", 1, "cat"), ("1.cls", b"dog"), ("1.png", noisy_png(2))]
    ).read_bytes()
    second = make_tar(tmp_path / "b.tar", sample("0", 3, "dog") + sample("1", 4, "cat")).read_bytes()
    end = first.rindex(b"IEND") + 8
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first[: end - removed] + second)
    found = {image.offset: image.label for image in index_shard(joined).images}
    whole = {first.index(b"\x89PNG"): "cat", first.rindex(b"\x89PNG"): "dog"}
    behind = {end - removed + second.index(b"\x89PNG"): "dog", end - removed + second.rindex(b"\x89PNG"): "cat"}
    assert found == {**dict(list(whole.items())[: 1 if removed else 2]), **behind}
    if removed:
        assert index_shard(joined).notes == [f"{joined}: another archive begins inside '1.png', which is left out."]


def noisy_png(value: int) -> bytes:
    """Encode a PNG of several kilobytes."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(value).integers(0, 255, (48, 48), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_damaged_first_header_costs_one_member(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", [member for n in range(4) for member in sample(str(n), n, "ab"[n % 2])])
    data = bytearray(path.read_bytes())
    data[:100] = b"\xff" * 100
    path.write_bytes(data)
    pairs, splits = contents(path)
    assert pairs == [(1, "b"), (2, "a"), (3, "b")]
    assert splits.notes == (f"{path} is damaged at byte 0: 1,024 bytes are skipped.",)


def test_folders_inside_shards(tmp_path: Path) -> None:
    folders = ["train/cat", "train/dog", "test/cat", "test/dog"]
    path = make_tar(tmp_path / "x.tar", [(f"{folder}/{n}.png", png(n)) for n, folder in enumerate(folders)])
    splits = open_images(str(path))
    assert (values(splits.train), labels(splits.train)) == ([0, 1], ["cat", "dog"])
    assert (splits.evaluation_name, values(splits.evaluation), labels(splits.evaluation)) == (
        "test",
        [2, 3],
        ["cat", "dog"],
    )
    assert splits.notes == (
        "No .cls or .json member holds a label: the folders inside the shards are taken for classes.",
    )
    # labels of members count before folders, which still declare splits
    members = [member for n, folder in enumerate(folders) for member in sample(f"{folder}/{n}", n, "ab"[n // 2 % 2])]
    splits = open_images(str(make_tar(tmp_path / "x.tar", [*members, *sample("train/cat/9", 9, "b")])))
    assert (values(splits.train), labels(splits.train)) == ([0, 1, 9], ["a", "a", "b"])
    assert (values(splits.evaluation), labels(splits.evaluation)) == ([2, 3], ["b", "b"])
    # the names of shards declare the splits, the folders inside the classes
    for name, shift in (("train-0.tar", 0), ("val-0.tar", 10), ("other.tar", 20)):
        make_tar(tmp_path / "s" / name, [("b/0.png", png(shift)), ("a/1.png", png(shift + 1))])
    splits = open_images(str(tmp_path / "s"))
    assert (values(splits.train), labels(splits.train)) == ([0, 1], ["b", "a"])
    assert (values(splits.evaluation), labels(splits.evaluation)) == ([10, 11], ["b", "a"])
    assert splits.left_out == {"in files that name no split, beside files that do": 2}


def test_masks_in_shards_are_left_out(tmp_path: Path) -> None:
    images = [(f"images/{n}.png", png(n)) for n in range(3)]
    masks = [(f"masks/{n}.png", png(200)) for n in range(3)]
    splits = open_images(str(make_tar(tmp_path / "x.tar", images + masks)))
    assert sorted(values(splits.train) + values(splits.evaluation)) == [0, 1, 2]
    assert splits.left_out == {"in a folder of masks": 3}
    members = [("1.png", png(1)), ("1_mask.png", png(200)), ("1.cls", b"cat"), ("2.cls", b"dog"), ("1.v2.png", png(2))]
    index = index_shard(make_tar(tmp_path / "x.tar", [*members, ("1.v2.cls", b"owl")]))
    assert [(image.member, image.label) for image in index.images] == [("1.png", "cat"), ("1.v2.png", "owl")]
    assert index.left_out == {"mask beside its image, such as x_mask.png": 1, "label without an image": 1}


def test_links_to_members(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in sample("a/0", 1, "cat"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        links = [("a/1.png", tarfile.LNKTYPE, "a/0.png"), ("b/2.png", tarfile.SYMTYPE, "../a/1.png")]
        links += [("a/1.cls", tarfile.LNKTYPE, "a/0.cls"), ("b/3.png", tarfile.SYMTYPE, "/etc/passwd")]
        links += [("b/4.png", tarfile.SYMTYPE, "4.png"), ("b/2.cls", tarfile.SYMTYPE, "../a/0.cls")]
        for name, kind, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    index = index_shard(path)
    assert [(image.member, image.label) for image in index.images] == [
        ("a/0.png", "cat"),
        ("a/1.png", "cat"),
        ("b/2.png", "cat"),
    ]
    assert len({image.offset for image in index.images}) == 1
    assert index.left_out == {"link to nothing in the shard": 2}


@pytest.mark.parametrize(
    ("names", "images"),
    [
        ("my.photo.png my.photo.cls plain.png plain.cls", {"my.photo.png", "plain.png"}),
        ("1.png 1.seg.png 1.cls", {"1.png"}),
        ("1.left.png 1.right.png 1.cls", {"1.left.png", "1.right.png"}),
        ("1.image.png 1.mask.png 1.cls", {"1.image.png"}),
        ("my.photo.png my.photo.seg.png my.photo.json", {"my.photo.png"}),
        ("1.png 1.jpg 1.cls", {"1.png", "1.jpg"}),
        ("1.npy 2.npy 1.cls 2.cls", {"1.npy", "2.npy"}),
    ],
)
def test_names_with_dots(tmp_path: Path, names: str, images: set[str]) -> None:
    label = {"cls": b"cat", "json": b'{"label": "cat"}'}
    members = [(name, label.get(name.rpartition(".")[2], png(1))) for name in names.split()]
    index = index_shard(make_tar(tmp_path / "x.tar", members))
    assert {image.member: image.label for image in index.images} == dict.fromkeys(images, "cat")
    assert len(index.images) + index.left_out.total() == sum(name.endswith(("g", "y")) for name in names.split())


def test_arrays_beside_images_are_features(tmp_path: Path) -> None:
    index = index_shard(make_tar(tmp_path / "x.tar", [("1.png", png(1)), ("1.npy", b"features"), ("1.txt", b"a cat")]))
    assert [image.member for image in index.images] == ["1.png"]
    assert index.left_out == {"extension .npy beside other images": 1, "extension .txt": 1}


def test_a_dotted_name_does_not_take_the_label_of_another(tmp_path: Path) -> None:
    index = index_shard(make_tar(tmp_path / "x.tar", [*sample("my.photo.1", 1, "cat"), ("my.photo.2.png", png(2))]))
    assert [image.label for image in index.images] == ["cat", None]


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (["3", "", "4"], r"1 of 3 images of train have no label, the first: .*x.tar/1.png"),
        (["3", "-1", "4"], r"1 of 3 images of train have no label, the first: .*x.tar/1.png"),
        (["3", "0.5", "4"], r"x.tar/1.png has the label 0.5, which is no class"),
        (["3", "3", "3"], "all images of train have the one class '3'"),
        (["", "", ""], r"no .cls or .json member holds a label"),
    ],
)
def test_shard_labels_that_cannot_be_used(tmp_path: Path, texts: list[str], problem: str) -> None:
    members = [member for n, text in enumerate(texts) for member in sample(str(n), n, text)]
    make_tar(tmp_path / "train" / "x.tar", members)
    make_tar(tmp_path / "test" / "y.tar", sample("0", 0, "3"))
    splits = open_images(str(tmp_path))
    with pytest.raises(DataError, match=f"has no labels that can be used: .*{problem}"):
        check_labels(splits, "x")
    assert bool(splits.notes) == (not problem.startswith("no .cls"))


def test_float_labels_of_shards_are_numbers(tmp_path: Path) -> None:
    members = [member for n in range(3) for member in sample(str(n), n, f"{n + 8}.0")]
    assert open_images(str(make_tar(tmp_path / "x.tar", members))).train.classes == ("8", "9", "10")


def test_an_index_is_made_anew_for_a_shard_with_the_same_time(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "x.tar", [*sample("0", 1, "cat"), *sample("1", 2, "dog")])
    before, fingerprint = path.stat(), open_images(str(path)).train.fingerprint
    make_tar(path, [*sample("0", 5, "dog"), *sample("1", 6, "cat")])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert contents(path)[0] == [(5, "dog"), (6, "cat")]
    assert open_images(str(path)).train.fingerprint != fingerprint


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
