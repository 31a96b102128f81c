"""`pecobook tokenize` and `pretrain --tokens`, as a user has them: the same tokens, and never another's."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import resource
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pecobook import api, cli, recipes
from pecobook.commands.tokenize import next_command
from pecobook.data import tokens
from pecobook.data.images import open_images
from pecobook.data.stream import Stream, collate
from pecobook.data.tokens import TokenBank
from pecobook.data.views import photometric
from pecobook.errors import DataError, PecobookError, PreflightError, RunFolderError
from pecobook.models.tokenizers import load_tokenizer
from pecobook.recipes import recipe
from pecobook.settings.pretrain import PretrainConfig
from pecobook.stages.pretrain import PretrainStage, encode_views
from pecobook.utils.images import to_float
from tests import forked
from tests.distributed import TwoProcesses
from tests.runs import SMALL, codebook_run, export_bytes, losses, train

__all__ = ["codebook_run"]  # the fixture

_VIEWS: dict[str, Any] = {"image_size": 16, "min_crop": 0.3, "seed": 5}
_COMMON: dict[str, Any] = {"precision": "fp32", "workers": 0, "batch_size": 7}


def make_bank(data: Path | str, tokenizer: Path | str, out: Path, **more: Any) -> Path:
    with contextlib.redirect_stderr(io.StringIO()):
        return api.tokenize(
            "tiny", data=str(data), tokenizer=str(tokenizer), out=str(out), **{**_VIEWS, **_COMMON, "views": 3, **more}
        )


@pytest.fixture(scope="module")
def bank(images: Path, codebook_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bank(images, codebook_run, tmp_path_factory.mktemp("banks") / "bank")


def test_tokenize__says_what_it_writes(
    images: Path, codebook_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**_VIEWS, **_COMMON, "views": 3}
    api.tokenize("tiny", data=str(images), tokenizer=str(codebook_run), out=str(tmp_path / "bank"), **settings)
    said = capsys.readouterr().err.splitlines()
    assert said[1] == "images     22 images to train on, 2 held out (held-out 10% of train)"
    assert said[4] == "views      3 of each training image, one of each held-out image, 4 x 4 tokens of 24 codewords"


def test_tokenize__every_banked_view_is_the_online_one(bank: Path, images: Path, codebook_run: Path) -> None:
    config = pretraining(images, codebook_run)
    tokenizer, splits = load_tokenizer(codebook_run), open_images(str(images))
    opened = TokenBank(bank)
    stream = Stream(
        splits.train, PretrainStage.view(config), config.seed, companion=PretrainStage(config).companions()[0]
    )
    count, compared = len(splits.train), 0
    for epoch in range(3):
        batch = collate([stream[epoch * count + place] for place in range(count)])
        codes = encode_views(tokenizer, photometric(to_float(batch["image"]), batch["colour"], config.colour), 0)
        for index, online in zip(batch["index"].tolist(), codes, strict=True):
            assert torch.equal(opened.read("train", index, epoch), online)
            compared += 1
    assert compared == 3 * count
    assert opened.config["num_images"] == count
    held_out = Stream(splits.evaluation, PretrainStage.evaluation_view(config), 0)
    for place in range(len(splits.evaluation)):
        sample = held_out[place]
        online = encode_views(tokenizer, to_float(sample["image"][None]), 0)[0]
        assert torch.equal(opened.read("evaluation", int(sample["index"]), 0), online)


def pretraining(images: Path, codebook: Path, **more: Any) -> PretrainConfig:
    from pecobook.settings.values import replace

    config: PretrainConfig = replace(
        recipe("pretrain", "tiny"),
        {**SMALL["pretrain"], "data": str(images), "tokenizer": str(codebook), **_VIEWS, **more},
    )
    return config


def pretrain(images: Path, codebook: Path, out: Path, **more: Any) -> Path:
    return train("pretrain", images, out, tokenizer=str(codebook), **{**_VIEWS, **more})


def test_pretrain__from_the_bank_is_pretraining_online(
    bank: Path, images: Path, codebook_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as views do not repeat, to the bit; and the tokenizer never runs."""
    online = pretrain(images, codebook_run, tmp_path / "online")

    def never(*_: object, **__: object) -> None:
        raise AssertionError("the tokenizer ran")

    monkeypatch.setattr("pecobook.models.tokenizer.PerceptualTokenizer.encode", never)
    banked = pretrain(images, codebook_run, tmp_path / "banked", tokens=str(bank))
    assert losses(banked) == losses(online)
    assert export_bytes(banked) == export_bytes(online)


def test_pretrain__repeats_views_but_not_masks(bank: Path, images: Path, codebook_run: Path) -> None:
    config = pretraining(images, codebook_run, tokens=str(bank))
    splits = open_images(str(images))
    stream = Stream(
        splits.train,
        PretrainStage.view(config),
        config.seed,
        companion=PretrainStage(config).companions()[0],
        num_views=PretrainStage(config).num_views(),
    )
    count = len(splits.train)
    seen: dict[int, list[dict[str, Any]]] = {}
    for position in range(4 * count):
        sample = stream[position]
        seen.setdefault(int(sample["index"]), []).append(sample)
    for samples in seen.values():
        first, second, _, fourth = samples  # three views: the fourth epoch shows the first again
        assert torch.equal(first["image"], fourth["image"])
        assert torch.equal(first["codes"], fourth["codes"])
        assert not torch.equal(first["image"], second["image"])
    assert any(not torch.equal(samples[0]["mask"], samples[3]["mask"]) for samples in seen.values())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"seed": 6}, "seed: 5 of the bank, 6 now"),
        ({"min_crop": 0.5}, "min_crop: 0.3 of the bank, 0.5 now"),
        ({"colour.hue": 0.1}, "colour: "),
    ],
)
def test_pretrain__refuses_a_bank_of_other_views(
    bank: Path, images: Path, codebook_run: Path, tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(PreflightError, match=said) as caught:
        pretrain(images, codebook_run, tmp_path / "run", tokens=str(bank), **more)
    assert "leave --tokens out" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_pretrain__refuses_a_bank_of_other_data_or_another_tokenizer(
    bank: Path, images: Path, codebook_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(PreflightError, match=r"of other images than --data .* data: "):
        train("pretrain", "photos", tmp_path / "run", tokenizer=str(codebook_run), tokens=str(bank), **_VIEWS)
    other = train("codebook", images, tmp_path / "other", seed=9)
    with pytest.raises(PreflightError, match="another tokenizer: tokenizer: "):
        pretrain(images, other, tmp_path / "run", tokens=str(bank))
    with pytest.raises(PreflightError, match="is not a token bank"):
        pretrain(images, codebook_run, tmp_path / "run", tokens=str(images))
    with pytest.raises(PecobookError, match="no effect with --target pixels"):
        pretrain(images, codebook_run, tmp_path / "run", tokens=str(bank), target="pixels")


# ------------------------------------------------------------------------------------------------------- writing


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def broken_copy(images: Path, folder: Path, *names: str) -> Path:
    shutil.copytree(images, folder)
    for name in names:
        (folder / name).write_bytes(b"no image")
    return folder


def make_on_each(rank: int, world_size: int, data: str, tokenizer: str, out: str, shard: int) -> None:
    tokens.SHARD_IMAGES = shard
    make_bank(data, tokenizer, Path(out), devices="2")


def test_tokenize__two_processes_write_what_one_does(
    images: Path, codebook_run: Path, tmp_path: Path, two_processes: TwoProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "SHARD_IMAGES", 3)
    bad = [f"{name}/{index}.png" for name in ("blue", "green", "red") for index in (1, 5)]
    data = broken_copy(images, tmp_path / "images", *bad)
    alone = make_bank(data, codebook_run, tmp_path / "alone")
    assert len(list((alone / "train").glob("codes-*"))) > 4
    assert len(list((alone / "train").glob("skipped-*"))) > 2
    two_processes.run(make_on_each, str(data), str(codebook_run), str(tmp_path / "two"), 3)
    assert files(tmp_path / "two") == files(alone)
    assert len((alone / "skipped.txt").read_text().splitlines()) == len(bad)


def test_tokenize__resumes_with_what_is_missing(
    images: Path, codebook_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "SHARD_IMAGES", 4)
    out = make_bank(images, codebook_run, tmp_path / "bank")
    whole = files(out)
    kept = out / "train" / "codes-00000.npy"
    before = kept.stat().st_mtime_ns
    (out / "train" / "codes-00002.npy").unlink()
    (out / "evaluation" / "codes-00000.npy").unlink()
    with pytest.raises(PreflightError, match="is not empty: continue with --resume"):
        make_bank(images, codebook_run, out)
    make_bank(images, codebook_run, out, resume=True)
    assert files(out) == whole
    assert kept.stat().st_mtime_ns == before
    with pytest.raises(RunFolderError, match=r"was begun with other settings: .*views: 3 of the bank, 2 now"):
        make_bank(images, codebook_run, out, resume=True, views=2)
    make_bank(images, codebook_run, out, overwrite=True, views=2)
    assert TokenBank(out).num_views == 2


def test_tokenize__lists_bad_images_and_pretraining_leaves_them_out(
    images: Path, codebook_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only the tokenizing could not read them; and a resume keeps the list."""
    monkeypatch.setattr(tokens, "SHARD_IMAGES", 4)
    data = broken_copy(images, tmp_path / "images", "red/0.png", "blue/2.png")
    online = pretrain(data, codebook_run, tmp_path / "online")
    out = make_bank(data, codebook_run, tmp_path / "bank")
    listed = (out / "skipped.txt").read_text()
    assert "red/0.png" in listed
    assert "blue/2.png" in listed  # held out
    assert len(TokenBank(out).skipped) == 1
    (out / "train" / "codes-00004.npy").unlink()
    make_bank(data, codebook_run, out, resume=True)
    assert (out / "skipped.txt").read_text() == listed
    for name in ("red/0.png", "blue/2.png"):
        shutil.copy(images / name, data / name)
    run = pretrain(data, codebook_run, tmp_path / "run", tokens=str(out))
    assert losses(run) == losses(online)


def hold_few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def test_tokenize__workers_hold_few_files_open(images: Path, codebook_run: Path, tmp_path: Path) -> None:
    """A batch crosses from a worker as a few tensors, not as some for each image, of which each is an open file."""
    data = tmp_path / "images"
    for index in range(10):
        shutil.copytree(images / "red", data / str(index))
    words = ["tokenize", "tiny", "--data", str(data), "--tokenizer", str(codebook_run), "--image-size", "16"]
    words += ["--batch-size", "64", "--precision", "fp32", "--workers", "2", "--out", str(tmp_path / "bank")]
    forked.run(words, tmp_path / "log", prepare=hold_few_files)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tokenizer": ""}, "--tokenizer is missing"),
        ({"tokenizer": "nowhere"}, "There is no run 'nowhere'"),
        ({"data": "nowhere"}, "does not exist"),
        ({"out": ""}, "--out is missing"),
        ({"image_size": 18}, "multiples of 4 pixels, not 18: give --image-size 16"),
        ({"resume": True}, "there is no token bank"),
    ],
)
def test_tokenize__refuses(images: Path, codebook_run: Path, tmp_path: Path, more: dict[str, Any], said: str) -> None:
    settings = {"data": str(images), "tokenizer": str(codebook_run), "out": str(tmp_path / "bank"), **_VIEWS, **more}
    with pytest.raises((PreflightError, DataError), match=said):
        api.tokenize("tiny", **settings)
    assert not (tmp_path / "bank").exists()


def test_tokenize__does_not_delete_what_is_no_bank(images: Path, codebook_run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(PreflightError, match="does not look like a token bank"):
        make_bank(images, codebook_run, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.txt").exists()
    with pytest.raises(PreflightError, match="does not look like a token bank"):
        make_bank(images, codebook_run, codebook_run, overwrite=True)  # a run has a config.json too
    assert (codebook_run / "export" / "model.safetensors").exists()


def write_short_shards() -> None:
    tokens.SHARD_IMAGES = 2


def test_command__killed_and_resumed_writes_the_same_bank(images: Path, codebook_run: Path, tmp_path: Path) -> None:
    words = ["tokenize", "tiny", "--data", str(images), "--tokenizer", str(codebook_run), "--image-size", "16"]
    words += ["--views", "40", "--batch-size", "8", "--precision", "fp32", "--workers", "0", "--out"]
    forked.run([*words, str(tmp_path / "whole")], tmp_path / "log", prepare=write_short_shards)
    out = tmp_path / "killed"
    process = forked.start([*words, str(out)], tmp_path / "log", prepare=write_short_shards)
    stop = time.monotonic() + 120
    while len(list(out.glob("train/codes-*.npy"))) < 2:
        assert process.exitcode is None
        assert time.monotonic() < stop
        time.sleep(0.002)
    process.kill()
    process.join()
    written = len(list(out.glob("train/codes-*.npy")))
    assert written < len(list((tmp_path / "whole" / "train").iterdir()))
    forked.run([*words, str(out), "--resume"], tmp_path / "log", prepare=write_short_shards)
    assert f"\n\npecobook pretrain tiny --data {images} --out {out}-vit " in (tmp_path / "log").read_text()
    assert files(out) == files(tmp_path / "whole")
    assert json.loads((out / "config.json").read_text())["views"] == 40


def test_last_line__is_a_command_that_pretrains_on_the_bank(
    images: Path, codebook_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Folders have spaces, the views differ from the recipe's, and the tokens make another grid than 4 x 4."""
    pictures, tokenizer, out = (tmp_path / name for name in ("my pictures", "my tokenizer", "my bank"))
    pictures.symlink_to(images)
    tokenizer.symlink_to(codebook_run)
    words = ["--data", str(pictures), "--tokenizer", str(tokenizer), "--out", str(out), "--image-size", "24"]
    cli.main(["tokenize", "tiny", *words, "--min-crop", "0.5", "--colour.hue", "0.2", "--workers", "0", "--seed", "3"])
    last = capsys.readouterr().err.rstrip().rpartition("\n")[2]
    program, *command = shlex.split(last)
    assert program == "pecobook"
    cli.main([*command, "--max-steps", "1", "--batch-size", "4", "--workers", "0"])
    written = json.loads((tmp_path / "my bank-vit" / "config.json").read_text())
    expected = {"tokens": str(out), "seed": 3, "min_crop": 0.5, "data": str(pictures), "image_size": 24}
    assert {name: written[name] for name in expected} == expected
    assert written["colour"]["hue"] == 0.2
    assert written["mask"] == {**written["mask"], "num_masked": 14, "min_block": 2}  # 6 of 16 are 14 of 36


def test_next_command__names_the_recipe_of_the_views() -> None:
    config = recipes.tokenize("paper-vit-h")
    line = next_command(dataclasses.replace(config, tokenizer="runs/codebook", out="b"), 16)
    assert line == ("pecobook pretrain paper-vit-h --data photos --out b-vit --tokenizer runs/codebook --tokens b")
