"""A token bank in an analysis: the results equal those computed from a list of all codes."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pecobook
from pecobook.commands.analyze.bank import bank_gallery, bank_usage, find_occurrences, view_of
from pecobook.data import tokens
from pecobook.data.images import open_images
from pecobook.data.sampler import splitmix64, splitmix64_array
from pecobook.data.tokens import TokenBank, bank_layouts, write_shard
from pecobook.data.views import NamedViews
from pecobook.errors import DataError, PreflightError
from pecobook.models.tokenizers import load_tokenizer
from pecobook.settings.pretrain import PretrainConfig
from pecobook.stages.pretrain import encode_views

K = 12


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenBank, np.ndarray[Any, Any]]:
    """A bank of 50 images with 2 views of 3 x 4 codes, in shards of 7, and all codes of the bank."""
    folder = tmp_path_factory.mktemp("bank")
    config = {"kind": "token bank", "grid": [3, 4], "views": 2, "num_images": 50, "num_evaluation_images": 1}
    config |= {"tokenizer": "", "data": "", "evaluation_data": "", **NamedViews.of(PretrainConfig()).settings()}
    (folder / "config.json").write_text(json.dumps(config))
    codes = np.random.default_rng(0).integers(0, K - 2, (50, 2, 3, 4)).astype(np.uint16)
    codes[codes == 3] = 4
    codes[17, 1, 2, 3] = 3  # once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "SHARD_IMAGES", 7)
        layout = bank_layouts(config)["train"]
        for shard in range(layout.num_shards):
            write_shard(layout.file(folder, shard), codes[shard * 7 : shard * 7 + 7])
        write_shard(bank_layouts(config)["evaluation"].file(folder, 0), codes[:1, :1])
        return TokenBank(folder), codes


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "SHARD_IMAGES", 7)
    monkeypatch.setattr("pecobook.commands.analyze.bank.CHUNK", 24 * 3)


def test_bank_usage__counts_every_code(simulated: tuple[TokenBank, np.ndarray[Any, Any]]) -> None:
    bank, codes = simulated
    usage = bank_usage(bank, K)
    counted = Counter(codes.reshape(-1).tolist())
    assert usage.counts.tolist() == [counted[code] for code in range(K)]
    assert usage.codes_used == len(counted)
    with pytest.raises(DataError, match="holds code 9, but there are only 4 codewords"):
        bank_usage(bank, 4)


def test_bank__leaves_out_unreadable_images(
    simulated: tuple[TokenBank, np.ndarray[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, codes = simulated
    skipped = np.array([0, 8, 49])
    monkeypatch.setattr(bank, "skipped", skipped)
    readable = np.delete(codes, skipped, axis=0)
    assert bank_usage(bank, K).counts.tolist() == np.bincount(readable.reshape(-1), minlength=K).tolist()
    (occurrence,) = find_occurrences(bank, [3], K, patches=1000, seed=5)
    expected = set(np.flatnonzero((codes == 3).any((1, 2, 3)))) - set(skipped)
    assert {image for image, *_ in occurrence.drawn} == expected
    for image, view, row, column in occurrence.drawn:
        assert codes[image, view, row, column] == 3


def test_find_occurrences__draws_the_images_with_the_lowest_ranks(
    simulated: tuple[TokenBank, np.ndarray[Any, Any]],
) -> None:
    bank, codes = simulated
    occurrences = {each.codeword: each for each in find_occurrences(bank, [5, 3, 11], K, patches=6, seed=1)}
    for codeword, each in occurrences.items():
        positions = np.argwhere(codes == codeword)
        assert each.positions.tolist() == (codes == codeword).sum((0, 1)).tolist()
        assert each.positions.sum() == len(positions)
        assert each.images == len(set(positions[:, 0].tolist()))
        assert len(each.drawn) == len({image for image, *_ in each.drawn}) == min(6, each.images)
        assert all(codes[position] == codeword for position in each.drawn)
    assert occurrences[3].drawn == ((17, 1, 2, 3),)
    assert occurrences[11].drawn == ()
    alone = find_occurrences(bank, [5], K, patches=6, seed=1)[0]
    for name in ("codeword", "images", "drawn"):  # whatever the other codewords
        assert getattr(alone, name) == getattr(occurrences[5], name)
    assert find_occurrences(bank, [5], K, patches=3, seed=1)[0].drawn == alone.drawn[:3]
    assert find_occurrences(bank, [5], K, patches=6, seed=2)[0].drawn != alone.drawn


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8))
def test_splitmix64_array__equals_splitmix64(values: list[int]) -> None:
    assert splitmix64_array(np.array(values, dtype=np.uint64)).tolist() == [splitmix64(value) for value in values]


@pytest.fixture
def bank(images: Path, codebook_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank with two views of each image, written by the command."""
    settings: dict[str, Any] = {"views": 2, "image_size": 16, "precision": "fp32", "workers": 0}
    out = str(tmp_path_factory.mktemp("bank") / "b")
    with contextlib.redirect_stderr(io.StringIO()):
        return pecobook.tokenize("tiny", data=str(images), tokenizer=str(codebook_run), out=out, **settings)


def test_analyze__reads_a_bank_and_reproduces_its_views(
    images: Path, codebook_run: Path, bank: Path, tmp_path: Path
) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        pecobook.analyze(tokenizer=str(codebook_run), tokens=(str(bank),), data=str(images), out=str(tmp_path / "a"))
    (metrics,) = json.loads((tmp_path / "a" / "analysis.json").read_text())["tokenizers"]
    opened, source, tokenizer = TokenBank(bank), open_images(str(images)).train, load_tokenizer(codebook_run)
    assert metrics["bank"]["num_images"] == len(source)
    assert metrics["bank"]["codes_used"] == bank_usage(opened, 24).codes_used
    assert (tmp_path / "a" / metrics["pictures"]["bank-gallery"]).is_file()
    assert "token bank: images" in (tmp_path / "a" / "report.html").read_text()
    most_used = int(bank_usage(opened, 24).counts.argmax())
    occurrences = find_occurrences(opened, [most_used], 24, patches=4, seed=0)
    for image, view, row, column in occurrences[0].drawn:  # each drawn patch has the code
        again = encode_views(tokenizer, view_of(opened.config, source, image, view)[None], 0)
        assert int(again[0, row, column]) == most_used
    gallery = bank_gallery(opened, source, occurrences)
    assert gallery[0].count == int(bank_usage(opened, 24).counts[most_used])
    assert [patch.image for patch in gallery[0].patches] == [image for image, *_ in occurrences[0].drawn]


def test_analyze__refuses_a_bank_of_another_tokenizer_or_of_other_images(
    images: Path, codebook_run: Path, bank: Path, tmp_path: Path
) -> None:
    bank = Path(shutil.copytree(bank, tmp_path / "b"))
    config = json.loads((bank / "config.json").read_text())
    (bank / "config.json.sha256").unlink()  # as a user deletes it who edits the file
    for change, message in (({"tokenizer": "0"}, "made by another tokenizer"), ({"data": "0"}, "from other images")):
        (bank / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(PreflightError, match=message):
            pecobook.analyze(
                tokenizer=str(codebook_run), tokens=(str(bank),), data=str(images), out=str(tmp_path / "a")
            )


def test_bank__a_flipped_bit_of_its_settings_is_noticed(bank: Path, tmp_path: Path) -> None:
    file = Path(shutil.copytree(bank, tmp_path / "b")) / "config.json"
    file.write_bytes(file.read_bytes().replace(b'"source"', b'"sourcf"'))
    with pytest.raises(DataError, match=r"config\.json' is damaged: its bytes are not those that were written"):
        TokenBank(file.parent)


def test_view_of__is_the_view_that_pretraining_sees(images: Path) -> None:
    from pecobook.data.stream import Stream
    from pecobook.data.views import photometric
    from pecobook.settings.images import PhotometricConfig
    from pecobook.stages.pretrain import PretrainStage
    from pecobook.utils.images import to_float

    config = PretrainConfig(image_size=16, min_crop=0.3, seed=5, colour=PhotometricConfig(jitter=1.0))
    source = open_images(str(images)).train
    sample = Stream(source, PretrainStage.view(config), config.seed)[3 + len(source)]
    online = photometric(to_float(sample["image"][None]), sample["colour"][None], config.colour)[0]
    bank = NamedViews.of(config).settings()
    assert torch.equal(view_of(bank, source, int(sample["index"]), 1), online)
