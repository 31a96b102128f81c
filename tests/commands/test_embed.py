"""`pecobook embed`: vectors are those of the network, rows belong to their images, an interrupted command goes on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torchvision.io import ImageReadMode, decode_image

from pecobook import cli
from pecobook.analysis.codewords import bag_of_codes
from pecobook.commands.embed import embed, files
from pecobook.data.views import center_crop
from pecobook.errors import DataError, PecobookError, RunFolderError
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.models.weights import load_backbone


def pixels(rows: list[dict[str, Any]], size: int) -> torch.Tensor:
    """Return the central crops of the images that the rows name, float (N, 3, S, S), read from their files."""
    files = [decode_image(row["image"], ImageReadMode.RGB) for row in rows]
    return torch.stack([center_crop(image, size) for image in files]) / 255


def vectors(out: Path, column: str = "embedding") -> np.ndarray[Any, Any]:
    return np.stack(pq.read_table(out)[column].to_numpy())


def test_embed__writes_the_vector_of_the_chosen_block_for_every_image(
    images: Path, vit_run: Path, tmp_path: Path
) -> None:
    out = embed(backbone=str(vit_run), data=str(images), out=str(tmp_path / "f.parquet"), batch_size=5, layer=1)
    rows = pq.read_table(out).to_pylist()
    backbone = load_backbone(str(vit_run))
    network: Any = backbone.network.eval()
    tokens: list[torch.Tensor] = []
    network.blocks[0].register_forward_hook(lambda _module, _inputs, output: tokens.append(output))
    mean, std = (torch.tensor(values)[:, None, None] for values in (backbone.mean, backbone.std))
    with torch.inference_mode():
        network((pixels(rows, 16) - mean) / std)
    expected = tokens[0][:, network.num_prefix_tokens :].mean(1)
    np.testing.assert_allclose(vectors(out), expected.numpy(), atol=1e-5)
    assert len(rows) == len(list(images.rglob("*.png")))
    assert all(Path(row["image"]).parent.name == row["label"] for row in rows)
    assert json.loads(pq.read_schema(out).metadata[b"pecobook"])["layer"] == 1
    assert not list(tmp_path.glob("*.parts"))


def test_embed__of_a_tokenizer_writes_codes_codewords_and_histograms(
    images: Path, codebook_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "codes.npz"
    cli.main(["embed", str(codebook_run), "--data", str(images), "--out", str(out), "--codes"])
    file = np.load(out)
    tokenizer = PerceptualTokenizer.from_pretrained(codebook_run)
    codes = tokenizer.encode(pixels([{"image": name} for name in file["image"].tolist()], 16))
    assert np.array_equal(file["codes"], codes.numpy())
    np.testing.assert_allclose(file["embedding"], tokenizer.codebook[codes].mean((1, 2)).numpy(), atol=1e-5)
    assert np.array_equal(file["histogram"], bag_of_codes(codes, tokenizer.num_codewords).numpy())


def test_embed__vectors_of_every_patch(images: Path, vit_run: Path, codebook_run: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data": str(images), "pool": "none"}
    patches = np.load(embed(backbone=str(vit_run), out=str(tmp_path / "p.npy"), layer=1, **settings))
    mean = embed(backbone=str(vit_run), out=str(tmp_path / "m.npy"), layer=1, data=str(images), pool="mean")
    np.testing.assert_allclose(patches.mean(1), np.load(mean), atol=1e-5)
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["image"]).parent.name for row in rows] == [row["label"] for row in rows]
    codewords = np.load(embed(backbone=str(codebook_run), out=str(tmp_path / "c.npy"), **settings))
    assert codewords.shape[:2] == (len(rows), 16)


def test_embed__of_a_network_without_tokens(images: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "backbone": "timm:resnet10t",
        "weights": "random",
        "data": str(images),
        "image_size": 64,
    }
    pooled = vectors(embed(out=str(tmp_path / "a.parquet"), **settings))
    patches = np.load(embed(out=str(tmp_path / "b.npy"), pool="none", **settings))
    np.testing.assert_allclose(patches.mean(1), pooled, atol=1e-4)


def test_embed__continues_after_a_kill_and_parts_of_several_processes_give_the_same_file(
    images: Path, vit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pecobook.commands.embed.PART_IMAGES", 4)
    settings: dict[str, Any] = {"backbone": str(vit_run), "data": str(images), "batch_size": 3}
    whole = embed(out=str(tmp_path / "whole.parquet"), **settings)

    write, written = files.write_part, 0

    def killed(*arguments: Any) -> None:
        nonlocal written
        written += 1
        if written == 3:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr("pecobook.commands.embed.write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        embed(out=str(tmp_path / "cut.parquet"), **settings)
    assert not (tmp_path / "cut.parquet").exists()
    with pytest.raises(RunFolderError, match=r"holds parts with other settings \(layer, features\)"):
        embed(out=str(tmp_path / "cut.parquet"), layer=1, **settings)
    written = 10
    embed(out=str(tmp_path / "cut.parquet"), **settings)
    for shard in ("2/3", "1/3", "3/3"):
        embed(out=str(tmp_path / "shards.parquet"), shard=shard, **settings)
    expected = pq.read_table(whole)
    for name in ("cut", "shards"):
        assert pq.read_table(tmp_path / f"{name}.parquet").equals(expected)
        assert not (tmp_path / f"{name}.parquet.parts").exists()


def test_embed__unreadable_images_are_listed_and_splits_are_named(images: Path, vit_run: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for split, names in (("train", ("a", "b", "c")), ("val", ("d",)), ("test", ("e",))):
        (data / split).mkdir(parents=True)
        for name, source in zip(names, sorted(images.rglob("*.png")), strict=False):
            (data / split / f"{name}.png").write_bytes(source.read_bytes())
    (data / "train" / "b.png").write_bytes(b"no image")
    out = embed(backbone=str(vit_run), data=str(data), out=str(tmp_path / "f.npz"))
    file = np.load(out)
    splits = dict(zip((Path(name).stem for name in file["image"].tolist()), file["split"].tolist(), strict=True))
    assert splits == {"a": "train", "c": "train", "d": "validation", "e": "test"}
    assert "b.png" in (tmp_path / "f.npz.skipped.txt").read_text()
    assert set(file["label"].tolist()) == {""}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"layer": 9}, "has 2 blocks, not 9"),
        ({"codes": True}, "--codes is for tokenizers"),
        ({"out": "features.csv"}, r"is a file .parquet, .npy or .npz"),
        ({"out": ""}, "--out is missing"),
        ({"backbone": ""}, "--backbone is missing"),
        ({"shard": "3/2"}, "I from 1 to N"),
        ({"backbone": "timm:resnet10t", "weights": "random", "pool": "class"}, "has no blocks of tokens"),
    ],
)
def test_embed__names_what_is_wrong_before_anything_is_written(
    wrong: dict[str, Any], words: str, images: Path, vit_run: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"backbone": str(vit_run), "data": str(images), "out": str(tmp_path / "f.parquet")}
    with pytest.raises(PecobookError, match=words):
        embed(**{**settings, **wrong})
    assert not list(tmp_path.iterdir())


def test_embed__keeps_a_file_and_a_folder_of_others(images: Path, vit_run: Path, tmp_path: Path) -> None:
    out, parts = tmp_path / "f.parquet", tmp_path / "f.parquet.parts"
    settings: dict[str, Any] = {"backbone": str(vit_run), "data": str(images), "out": str(out)}
    parts.mkdir()
    (parts / "mine.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="holds other files"):
        embed(**settings)
    (parts / "mine.txt").unlink()
    out.write_text("mine")
    with pytest.raises(RunFolderError, match="exists already"):
        embed(**settings)
    assert out.read_text() == "mine"
    embed(**settings, overwrite=True)
    assert len(pq.read_table(out))


def test_embed__touches_no_images_and_no_table_of_others(images: Path, tmp_path: Path) -> None:
    table = tmp_path / "images.parquet"
    table.write_bytes(b"images")
    (tmp_path / "features.csv").write_text("mine")
    for data, out in ((table, table), (images, images / "features.parquet"), (images, images / "red" / "f.npz")):
        with pytest.raises(RunFolderError, match=r"is or lies in the images .*: name a file outside of them"):
            embed(backbone="timm:test_vit", data=str(data), out=str(out), overwrite=True)
    with pytest.raises(RunFolderError, match=r"features\.csv' exists already"):
        embed(backbone="timm:test_vit", data=str(images), out=str(tmp_path / "features.npy"))
    assert table.read_bytes() == b"images"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.csv", "images.parquet"]


@pytest.mark.parametrize("out", ["all.parquet", "all.npy", "all.npz"])
def test_join_parts__notices_every_damage_of_a_part(out: str, tmp_path: Path) -> None:
    part = files.part_file(tmp_path, 0)
    values = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    files.write_part(part, list("abcd"), "train", [None] * 4, {"embedding": values})
    whole = part.read_bytes()
    assert files.join_parts([part], tmp_path / out, {}) == 4
    (tmp_path / out).unlink()
    start = whole.index(values[0].tobytes()[:4])  # the bytes of the first number
    flipped = bytearray(whole)
    flipped[start] ^= 1
    for damaged in (b"", whole[: len(whole) // 2], bytes(flipped)):
        part.write_bytes(damaged)
        with pytest.raises(DataError, match=r"A file in .* is damaged \(.*\)\. Delete that folder"):
            files.join_parts([part], tmp_path / out, {})
        assert not (tmp_path / out).exists()
