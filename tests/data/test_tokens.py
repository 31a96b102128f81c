"""The files of a token bank: layout, reading, and the errors for unfinished or damaged banks."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pecobook.data import tokens
from pecobook.data.decode import BadImage
from pecobook.data.tokens import BankLayout, TokenBank, bank_differences, write_shard
from pecobook.engine.world import is_first_on_machine
from pecobook.errors import DataError
from pecobook.settings.images import PhotometricConfig


def write_bank(folder: Path, *, images: int = 7, views: int = 3, held_out: int = 2, **more: Any) -> dict[str, Any]:
    """Write a bank whose codes encode their position (image, view, row, column)."""
    config: dict[str, Any] = {"kind": "token bank", "grid": [2, 3], "views": views, "num_images": images}
    config |= {"num_evaluation_images": held_out, "tokenizer": "t", "data": "d", "evaluation_data": "e"}
    config |= {"seed": 0, "image_size": 8, "tokenizer_size": 8, "min_crop": 0.2, **more}
    config["colour"] = dataclasses.asdict(PhotometricConfig())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for layout in tokens.bank_layouts(config).values():
        for shard in range(layout.num_shards):
            codes = [
                [[[code_at(i, v, r, c) for c in range(3)] for r in range(2)] for v in range(layout.num_views)]
                for i in layout.images_of(shard)
            ]
            write_shard(layout.file(folder, shard), np.array(codes, dtype=np.uint16))
    return config


def code_at(image: int, view: int, row: int, column: int) -> int:
    return 1000 * image + 100 * view + 10 * row + column


@pytest.mark.parametrize("per_shard", [1, 3, 7, 100])
def test_read__gives_each_view_from_its_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_shard: int) -> None:
    monkeypatch.setattr(tokens, "SHARD_IMAGES", per_shard)
    write_bank(tmp_path)
    bank = TokenBank(tmp_path)
    assert bank.num_views == 3
    bank = pickle.loads(pickle.dumps(bank))  # as to a data worker
    for image in range(7):
        for view in range(3):
            codes = bank.read("train", image, view)
            assert codes.dtype == torch.int64
            assert codes.tolist() == [[code_at(image, view, r, c) for c in range(3)] for r in range(2)]
    assert int(bank.read("evaluation", 1, 0)[1, 2]) == code_at(1, 0, 1, 2)


def test_read__keeps_all_sixteen_bits(tmp_path: Path) -> None:
    write_bank(tmp_path, images=1, views=1)
    write_shard(tmp_path / "train" / "codes-00000.npy", np.full((1, 1, 2, 3), 65_535, dtype=np.uint16))
    assert int(TokenBank(tmp_path).read("train", 0, 0).max()) == 65_535


@given(st.integers(1, 3_000_000), st.integers(1, 64), st.integers(1, 28), st.integers(1, 28))
def test_layout__covers_every_image_once(images: int, views: int, rows: int, columns: int) -> None:
    layout = BankLayout("train", images, views, (rows, columns))
    assert layout.shard_images * views * rows * columns * 2 <= 2**26 or layout.shard_images == 1
    ends = [layout.images_of(0).start, layout.images_of(layout.num_shards - 1).stop]
    assert ends == [0, images]
    for shard in {0, layout.num_shards // 2, layout.num_shards - 1} - {0}:
        assert layout.images_of(shard).start == layout.images_of(shard - 1).stop
        assert len(layout.images_of(shard)) > 0


def test_open__refuses_an_unfinished_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "SHARD_IMAGES", 2)
    write_bank(tmp_path)
    (tmp_path / "train" / "codes-00002.npy").rename(tmp_path / "train" / ".codes-00002.npy.tmp")
    with pytest.raises(
        DataError, match=r"unfinished: 1 of its files are missing; the first is 'train/codes-00002.npy'"
    ):
        TokenBank(tmp_path)


def test_open__refuses_a_bank_whose_config_names_more_images_than_there_are_files(tmp_path: Path) -> None:
    write_bank(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_images": 10**15}))
    file.with_name("config.json.sha256").unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"unfinished: \d+ of its files are missing"):
        TokenBank(tmp_path)


def test_open__refuses_a_folder_without_a_bank(tmp_path: Path) -> None:
    not_a_bank = "which is not .token bank.|does not hold a JSON object"
    with pytest.raises(DataError, match=r"is not a token bank\. Make a token bank with"):
        TokenBank(tmp_path)
    for text, message in (("{", "cannot be read"), ("[]", not_a_bank), ('{"kind": "run"}', not_a_bank)):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(DataError, match=message):
            TokenBank(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "text", "shape", "type", "pickle"])
def test_read__refuses_a_damaged_file(tmp_path: Path, damage: str) -> None:
    write_bank(tmp_path)
    file = tmp_path / "train" / "codes-00000.npy"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:60])
    elif damage == "text":
        file.write_text("nothing")
    elif damage == "shape":
        write_shard(file, np.zeros((7, 2, 2, 3), dtype=np.uint16))
    elif damage == "type":
        np.save(file, np.zeros((7, 3, 2, 3)))
    else:
        np.save(file, np.array([print], dtype=object), allow_pickle=True)
    if damage != "shape":
        with pytest.raises(DataError, match=r"codes-00000\.npy' is damaged.*\nDelete that file"):
            TokenBank(tmp_path)
    file.with_name("codes-00000.npy.sha256").unlink()  # as in a bank of an older version
    for verify in (True, False):
        with pytest.raises(DataError, match=r"codes-00000\.npy' of the token bank"):
            TokenBank(tmp_path, verify=verify).read("train", 0, 0)


def test_open__refuses_a_shard_of_another_bank_and_one_that_is_no_array(tmp_path: Path) -> None:
    write_bank(tmp_path)
    first, held_out = (tmp_path / split / "codes-00000.npy" for split in ("train", "evaluation"))
    whole = first.read_bytes()
    for file, other in ((first, held_out), (Path(f"{first}.sha256"), Path(f"{held_out}.sha256"))):
        file.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match=r"holds uint16 \(2, 1, 2, 3\), not uint16 \(7, 3, 2, 3\)\. Delete the file"):
        TokenBank(tmp_path)
    Path(f"{first}.sha256").unlink()
    first.write_bytes(b"nonumpy" + whole[7:])  # NumPy then takes it for a pickle, and advises to allow that
    with pytest.raises(DataError, match=r"cannot be read: it holds no array of numbers\. Delete the file"):
        TokenBank(tmp_path)


def test_read__refuses_a_code_that_the_tokenizer_lacks(tmp_path: Path) -> None:
    write_bank(tmp_path)
    highest = code_at(1, 2, 1, 2)
    assert TokenBank(tmp_path, highest + 1).read("train", 1, 2).max() == highest
    with pytest.raises(DataError, match=rf"codes-00000\.npy' .* holds the code {highest}, but .* {highest} codewords"):
        TokenBank(tmp_path, highest).read("train", 1, 2)
    (tmp_path / "train" / "codes-00000.npy.sha256").unlink()  # without a checksum the bank may be anybody's
    with pytest.raises(DataError, match="holds the code 6212"):
        TokenBank(tmp_path, highest)


@pytest.mark.parametrize(("variables", "verified"), [({}, True), ({"LOCAL_RANK": "1"}, False)])
def test_open__one_process_of_a_machine_verifies_and_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    verified: bool,
) -> None:
    write_bank(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "train" / "codes-00000.npy.sha256").write_text("0 codes-00000.npy")
    if verified:
        with pytest.raises(DataError, match="is damaged"):
            TokenBank(tmp_path, verify=is_first_on_machine())
    else:
        TokenBank(tmp_path, verify=is_first_on_machine())
    (tmp_path / "train" / "codes-00000.npy.sha256").unlink()
    TokenBank(tmp_path, verify=is_first_on_machine())
    assert ("MiB verified in" in capsys.readouterr().err) == verified
    monkeypatch.setenv("PECOBOOK_SKIP_CHECKSUMS", "1")
    TokenBank(tmp_path)
    assert capsys.readouterr().err == ""


def test_skipped__are_listed_and_have_no_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "SHARD_IMAGES", 3)
    write_bank(tmp_path)
    assert TokenBank(tmp_path).skipped.tolist() == []
    codes = np.zeros((3, 3, 2, 3), dtype=np.uint16)
    for shard, bad in (
        (0, {2: BadImage("two", "truncated")}),
        (1, {5: BadImage("five", "empty"), 3: BadImage("x", "")}),
    ):
        write_shard(tmp_path / "train" / f"codes-{shard:05d}.npy", codes, bad)
    bank = pickle.loads(pickle.dumps(TokenBank(tmp_path)))
    assert bank.skipped.dtype == np.int64
    assert bank.skipped.tolist() == [2, 3, 5]
    with pytest.raises(BadImage, match="two: truncated"):
        bank.read("train", 2, 1)
    assert int(bank.read("evaluation", 1, 0)[0, 0]) == code_at(1, 0, 0, 0)
    write_shard(tmp_path / "train" / "codes-00001.npy", codes)  # without unreadable images
    assert TokenBank(tmp_path).skipped.tolist() == [2]


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 1}'])
def test_skipped__refuses_a_damaged_list(tmp_path: Path, text: str) -> None:
    write_bank(tmp_path)
    (tmp_path / "train" / "skipped-00000.json").write_text(text)
    with pytest.raises(DataError, match=r"skipped-00000\.json' (cannot be read|does not hold)"):
        TokenBank(tmp_path)


def test_differences__names_both_sides() -> None:
    assert bank_differences({"seed": 0, "more": 1}, {"seed": 4, "size": 2}) == [
        "seed: 0 of the bank, 4 now",
        "size: None of the bank, 2 now",
    ]


def test_large_codebook__has_codes_of_four_bytes(tmp_path: Path) -> None:
    assert tokens.code_type(2**16) == {}
    config = write_bank(tmp_path, code_type=tokens.code_type(2**18)["code_type"])
    layouts = tokens.bank_layouts(config)
    for layout in layouts.values():
        for number in range(layout.num_shards):
            file = layout.file(tmp_path, number)
            write_shard(file, np.load(file).astype(np.uint32) + 200_000)
    bank = TokenBank(tmp_path, 2**18)
    assert bank.shard("train", 0).dtype == np.uint32
    assert int(bank.read("train", 6, 2)[1, 2]) == 200_000 + code_at(6, 2, 1, 2)
    small = BankLayout("train", 10**6, 4, (14, 14))
    large = BankLayout("train", 10**6, 4, (14, 14), "uint32")
    assert large.shard_images == min(small.shard_images, tokens._SHARD_BYTES // (4 * 4 * 196))
    write_shard(layouts["train"].file(tmp_path, 0), bank.shard("train", 0).astype(np.uint16))
    with pytest.raises(DataError, match=r"holds uint16 .* not uint32"):
        TokenBank(tmp_path, 2**18)
