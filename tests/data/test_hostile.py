"""Files of users that once gave a wrong image or a wrong label, or a traceback: damage, odd names, data that change."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pecobook.data.decode import BadImage, decode
from pecobook.data.deep import ValueRange
from pecobook.data.dense.mask_files import read_pixels
from pecobook.data.dense.segmentation_pairs import find_pairs
from pecobook.data.folders import walk
from pecobook.data.given import given_contents
from pecobook.data.images import open_images
from pecobook.data.parts import assemble, class_indices
from pecobook.errors import DataError
from pecobook.settings.changes import changed_settings
from tests.data.pictures import encode, picture, png_16, tiff, to_pixels
from tests.data.sources import make_tar, png, samples, values, write

COMPOSED, SPLIT = "caf\u00e9", "cafe\u0301"
"""One name, as most programs write it and as macOS does."""


def labels(source: str | Path) -> dict[str, str]:
    """Return the class of each image of a source, by the end of the image's name."""
    found = {}
    for images in (open_images(str(source)).train, open_images(str(source)).evaluation):
        assert images.labels is not None, images.unlabelled
        for number, label in enumerate(images.labels):
            found[Path(images.identify(number)).name] = images.classes[label]  # type: ignore[index]
    return found


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize(
    "data", [encode(Image.fromarray(picture()), "PNG"), png_16(np.full((24, 40, 3), 999, np.uint16), 2)]
)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_png_whose_end_was_never_written_is_bad(data: bytes, share: float) -> None:
    decode(data)
    end = data.index(b"IDAT") + 4 + int.from_bytes(data[data.index(b"IDAT") - 4 : data.index(b"IDAT")])
    for filler in (b"\0", b"\xff"):
        kept = int(share * end)
        with pytest.raises(BadImage, match=r"damaged|truncated|broken"):
            decode(data[:kept] + filler * (len(data) - kept))


def test_a_byte_of_the_pixels_of_a_png_that_flipped_is_noticed() -> None:
    # Pixels that are not compressed: nothing but the checksum can tell.
    data = bytearray(encode(Image.fromarray(picture()), "PNG", compress_level=0))
    data[len(data) // 2] ^= 1
    with pytest.raises(BadImage, match="do not have their checksum"):
        decode(bytes(data))
    mask = bytearray(encode(Image.fromarray(np.zeros((9, 9), np.uint8)), "PNG", compress_level=0))
    mask[mask.index(b"IDAT") + 20] ^= 3
    with pytest.raises(BadImage, match=r"^m\.png: damaged: .* checksum"):
        read_pixels(bytes(mask), name="m.png")


def test_damage_of_a_tiff_is_told_by_the_error_alone(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BadImage):
        decode(encode(Image.fromarray(picture()), "TIFF")[:-100])
    assert caplog.records == []


def test_signed_bytes_of_a_tiff_keep_their_sign() -> None:
    values = np.arange(-128, 128, dtype=np.int8).reshape(16, 16)
    data = tiff(values)
    with pytest.raises(BadImage, match="int8 values have no agreed range: give --value-range LOW HIGH"):
        decode(data)
    assert to_pixels(decode(data, value_range=ValueRange(-128, 127)))[..., 0].tolist() == (values + 128.0).tolist()
    with pytest.raises(BadImage, match="holds the value -128, but values start at 0"):
        read_pixels(data, name="m.tif")
    assert read_pixels(tiff(values.clip(0)), name="m.tif").values(None).max() == 127


def test_a_tiff_of_many_bands_says_what_it_holds() -> None:
    for bands in (np.zeros((9, 8, 13), np.uint16), np.zeros((9, 8, 3), np.float32)):
        with pytest.raises(
            BadImage, match=r"a TIFF of (uint16|float32) \(.*9, 8.*\) is not read: save it as grey or RGB"
        ):
            decode(tiff(bands, photometric="minisblack", planarconfig="contig"))


# -------------------------------------------------------------------------------------------------- data that change


@pytest.mark.parametrize("how", ["replaced", "written"])
def test_a_shard_that_changes_under_a_run_gives_no_other_image(tmp_path: Path, how: str) -> None:
    shard = make_tar(tmp_path / "x.tar", samples(range(8)))
    os.utime(shard, (10**9,) * 2)
    images = open_images(str(shard)).train
    values(images)
    if how == "replaced":
        images = open_images(str(shard)).train  # not opened yet
        make_tar(tmp_path / "new", samples(range(8, 16))).replace(shard)
    else:
        shard.write_bytes(make_tar(tmp_path / "new", samples(range(8, 16))).read_bytes())
    with pytest.raises(BadImage, match=r"x\.tar/.*: the shard was written since it was opened"):
        images.read(0)


def test_an_address_with_a_new_signature_continues_a_run() -> None:
    old, new = (f"https://host/set-{{0..9}}.tar?X-Expires={n}" for n in (1, 2))
    assert changed_settings({"data": old, "mask": {"x": 1}}, {"data": new, "mask": {"x": 1}}) == []
    assert changed_settings({"data": old}, {"data": new.replace("set", "other")}) != []
    assert (
        changed_settings(
            {"compile": True, "compile_mode": "max-autotune"}, {"compile": False, "compile_mode": "default"}
        )
        == []
    )


# ------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("extension", "first", "second", "classes"),
    [
        ("cls", b"\xef\xbb\xbfcat", b"dog\r\n", ["cat", "dog"]),
        ("json", b'\xef\xbb\xbf{"label": "cat"}', b'{"label": "dog"}', ["cat", "dog"]),
        ("cls", b"caf\xe9", b"caf\xe8", ["caf\\xe9", "caf\\xe8"]),  # Latin-1
        ("cls", b"9007199254740993", b"9007199254740992", ["9007199254740993", "9007199254740992"]),
        ("cls", b"1_0", b"10", ["1_0", "10"]),
        ("cls", b"9" * 5000, b"1", ["9" * 5000, "1"]),
    ],
)
def test_labels_of_shards_are_not_changed(
    extension: str, first: bytes, second: bytes, classes: list[str], tmp_path: Path
) -> None:
    members: dict[str, bytes] = {}
    for number in range(8):
        members |= {f"{number}.png": png(number), f"{number}.{extension}": (first, second)[number % 2]}
    shard = make_tar(tmp_path / "x.tar", members.items())
    assert labels(shard) == {f"{number}.png": classes[number % 2] for number in range(8)}


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"label": ' + b"9" * 5000 + b"}"])
def test_a_json_member_that_cannot_be_read_holds_no_label(text: bytes, tmp_path: Path) -> None:
    shard = make_tar(tmp_path / "x.tar", [*samples(range(9)), ("a.png", png(9)), ("a.json", text)])
    images = open_images(str(shard)).train
    assert images.labels is None
    assert "a.png" in images.unlabelled


def test_two_forms_of_a_name_are_one_class(tmp_path: Path) -> None:
    for form, split in ((COMPOSED, "train"), (SPLIT, "val")):
        write(tmp_path / "set" / split / form / f"{split}.png", 1)
        write(tmp_path / "set" / split / "dog" / f"{split}-dog.png", 2)
    expected = {"train.png": COMPOSED, "val.png": COMPOSED, "train-dog.png": "dog", "val-dog.png": "dog"}
    assert labels(tmp_path / "set") == expected
    pq.write_table(pa.table({"image": [png(1)] * 9, "label": [COMPOSED, SPLIT, "dog"] * 3}), tmp_path / "x.parquet")
    assert open_images(str(tmp_path / "x.parquet")).train.classes == (COMPOSED, "dog")
    (tmp_path / "classes.txt").write_text(f"{SPLIT}\ndog\n")
    assert open_images(str(tmp_path / "x.parquet")).train.classes == (COMPOSED, "dog")
    assert class_indices(["dog", SPLIT], [COMPOSED], "run", "x") == [1]


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_names_of_classes_in_another_encoding_are_refused(encoding: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(1)] * 4, "label": [0, 1] * 2}), tmp_path / "x.parquet")
    (tmp_path / "classes.txt").write_text(f"{COMPOSED}\ndog\n", encoding=encoding)
    with pytest.raises(
        DataError, match=r"classes\.txt', the names of the classes, cannot be read: it is not text in UTF-8"
    ):
        open_images(str(tmp_path / "x.parquet"))


class Cranes:
    """A data set of torch with the names of classes that torchvision's ImageNet has."""

    classes = (("great white shark", "white shark"), ("crane",), ("crane",))
    targets = (0, 1, 2) * 4

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return torch.full((3, 8, 8), index, dtype=torch.uint8), self.targets[index]


def test_two_classes_of_one_name_stay_two() -> None:
    splits = assemble("x", given_contents({"train": Cranes(), "validation": Cranes()}, "x"))
    assert splits.train.classes == ("great white shark, white shark", "crane (1)", "crane (2)")
    assert splits.evaluation.labels is not None
    assert splits.evaluation.labels.tolist() == list(Cranes.targets)


def test_the_names_of_a_class_label_are_found_however_their_accents_are_written(tmp_path: Path) -> None:
    feature = {"label": {"_type": "ClassLabel", "names": ["b", SPLIT]}}
    table = pa.table({"image": [png(1)] * 4, "label": [0, 1] * 2})
    described = {b"huggingface": json.dumps({"info": {"features": feature}}).encode()}
    pq.write_table(table.replace_schema_metadata(described), tmp_path / "x.parquet")
    assert open_images(str(tmp_path / "x.parquet")).train.classes == ("b", COMPOSED)
    assert class_indices(["b", SPLIT], [SPLIT], "run", "x") == [1]


@pytest.mark.parametrize("feature", [{"_type": "Picture"}, {"_type": "ClassLabel", "names": ["a", "a"]}])
def test_what_another_version_says_of_columns_is_an_error(feature: dict[str, Any], tmp_path: Path) -> None:
    described = {b"huggingface": json.dumps({"info": {"features": {"label": feature}}}).encode()}
    table = pa.table({"image": [png(1)] * 4, "label": [0, 1] * 2}).replace_schema_metadata(described)
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"what '.*x\.parquet' says of its columns cannot be read.*\nUpdate `datasets`"):
        open_images(str(tmp_path / "x.parquet"))


# ------------------------------------------------------------------------------------------------------------ folders


def test_folders_of_network_storage_and_of_file_systems_hold_no_images(tmp_path: Path) -> None:
    names = ("@eaDir", "#recycle", "lost+found", "System Volume Information", ".thumbnails")
    for folder in ("", *names):
        write(tmp_path / "set" / folder / "0.png", 0)
    write(tmp_path / "set" / "1.png", 1)
    splits = open_images(str(tmp_path / "set"))
    assert sorted(values(splits.train) + values(splits.evaluation)) == [0, 1]
    assert splits.left_out == {"hidden": len(names)}
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "set", arcname=".")
    splits = open_images(str(tmp_path / "x.tar"))
    assert sorted(values(splits.train) + values(splits.evaluation)) == [0, 1]
    assert splits.left_out == {"hidden": len(names)}


def test_a_folder_that_may_not_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("images/a.png", "masks/a.png"):
        write(tmp_path / name, 1)
    scan = os.scandir

    def refuse(folder: Any) -> Any:  # root may list all folders
        if os.fsdecode(folder).rstrip("/").endswith("masks"):
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    for listed in (lambda: walk(tmp_path), lambda: find_pairs(str(tmp_path), tmp_path)):
        with pytest.raises(DataError, match=r"masks/?' cannot be listed: Permission denied\. Let this user read it"):
            listed()


def test_a_shard_that_may_not_be_read_is_not_called_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(shard: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(shard))

    make_tar(tmp_path / "x.tar", samples(range(4)))
    monkeypatch.setattr("pecobook.data.shards.index_shard", refuse)
    monkeypatch.setenv("PECOBOOK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"x\.tar' cannot be read as a tar file: Permission denied\.$"):
        open_images(str(tmp_path / "x.tar"))
