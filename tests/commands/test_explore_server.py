"""`pecobook explore`: the answers, the server, and the privacy of files."""

from __future__ import annotations

import http.client
import io
import json
import os
import shutil
import signal
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

import pecobook
from pecobook import cli
from pecobook.analysis.position import position_dependence
from pecobook.commands.explore import model
from pecobook.commands.explore.answers import STRIP, THUMBNAIL, UPLOADS, Answers, Images, Refused
from pecobook.commands.explore.server import Server
from pecobook.commands.masked_run import load_masked_run
from pecobook.data.images import open_images
from pecobook.data.views import center_crop
from pecobook.errors import ConfigError, PreflightError, WeightsError
from pecobook.settings.explore import ExploreConfig
from tests import forked
from tests.commands.test_explore import crops, indexed

__all__ = ["crops", "indexed"]  # the fixtures


# --------------------------------------------------------------------------------------------------------- the answers


def test_images__give_uploads_the_same_codes(images: Path, tmp_path: Path) -> None:
    files = sorted(images.rglob("*.png"))[:3]
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for number, file in enumerate(files):
            (tmp_path / split / f"{number}.png").write_bytes(file.read_bytes())
    (tmp_path / "test" / "3.png").write_bytes(b"\x89PNG nonsense")
    source = open_images(str(tmp_path)).evaluation
    store = Images(source, {8, 32})
    for number in range(3):
        name = store.add((tmp_path / "test" / f"{number}.png").read_bytes())
        for size in (8, 32):
            assert torch.equal(store.crop(name, size), store.crop(str(number), size))
            assert torch.equal(store.crop(name, size), center_crop(source.read(number), size))
        assert store.describe(name) == {"name": "your image", "class": ""}
        assert store.describe(str(number))["name"] == source.identify(number)
    with pytest.raises(Refused, match="cannot be read"):
        store.crop("3", 8)
    with pytest.raises(Refused, match="cannot be read: "):
        store.add(b"\x89PNG nonsense")
    for name in ("4", "-1", "1e3", "99999999999999999999", "/etc/passwd", "../test/0.png", "upload-x"):
        with pytest.raises(Refused) as caught:
            store.crop(name, 8)
        assert caught.value.status == 404
    with pytest.raises(Refused):
        store.crop("0", 10_000)


def test_images__keep_a_bounded_number_of_small_uploads(images: Path) -> None:
    store = Images(open_images(str(images)).evaluation, {8})
    data = io.BytesIO()
    PIL.Image.new("RGB", (1000, 40)).save(data, "png")
    names = [store.add(data.getvalue()) for _ in range(UPLOADS + 2)]
    assert len(set(names)) == UPLOADS + 2
    assert store.crop(names[2], 8).untyped_storage().nbytes() == 3 * 8 * 8
    with pytest.raises(Refused, match="upload it again"):
        store.crop(names[1], 8)


@pytest.fixture(scope="module")
def answers(indexed: model.IndexedTokenizer, images: Path, vit_run: Path) -> Answers:
    runs = {"vit": (load_masked_run(vit_run), "small")}
    return Answers([indexed], runs, open_images(str(images)).evaluation, upload_mb=1)


def test_answers__to_each_address(answers: Answers, indexed: model.IndexedTokenizer, crops: Tensor) -> None:
    def values(path: str, **query: str) -> Any:
        return json.loads(answers.get(path, query).body)

    def picture(path: str, **query: str) -> Tensor:
        return torch.from_numpy(np.array(PIL.Image.open(io.BytesIO(answers.get(path, query).body)))).permute(2, 0, 1)

    setup = values("/api/setup")
    position = position_dependence(indexed.codes)
    assert setup["tokenizers"][0].pop("position") == [
        pytest.approx(100 * share, abs=0.05) for share in (position.share, position.null_share)
    ]
    assert setup["tokenizers"][0] | {"used": 0} == {
        "name": "small", "codewords": 24, "used": 0, "grid": [4, 4], "size": 16, "images": 2, "labelled": True
    }  # fmt: skip
    assert setup["runs"] == [{"name": "vit", "tokenizer": "small", "grid": [4, 4], "size": 16}]
    strip = values("/api/images", page="0")
    assert sorted(int(one["image"]) for one in strip["images"]) == sorted(indexed.rows.tolist())[:STRIP]
    image = int(indexed.rows[1])
    assert values("/api/image", tokenizer="small", image=str(image))["codes"] == indexed.codes[1].tolist()
    assert values("/api/codeword", tokenizer="small", codeword="3") == model.codeword_values(indexed, 3)
    assert values("/api/codewords", tokenizer="small", sort="lift", page="1") == model.codeword_list(indexed, "lift", 1)
    assert torch.equal(picture("/picture", image=str(image), size="16"), crops[1])
    assert picture("/picture", image=str(image), size=str(THUMBNAIL)).shape == (3, 96, 96)
    encoded = model.encode_image(indexed.tokenizer, crops[1])
    for kind in ("restored", "error"):
        shown = picture("/picture", image=str(image), tokenizer="small", kind=kind)
        assert torch.equal(shown, getattr(encoded, kind))
    tiles = model.tiles(indexed, [7, 3])
    for _ in range(2):  # computed, then remembered
        assert torch.equal(picture("/tiles", tokenizer="small", codewords="7,3,7"), torch.cat([*tiles, tiles[0]], 2))
    assert values("/api/atlas", tokenizer="small")["codeword"] == model.atlas(indexed).codewords.tolist()
    assert answers.get("/atlas", {"tokenizer": "small"}).body.startswith(b"\xff\xd8")
    mask = values("/api/mask", run="vit", seed="1")["mask"]
    assert (len(mask), mask.count("1")) == (16, answers.runs["vit"][0].config.mask.num_masked)
    predicted = values("/api/predict", run="vit", image=str(image), mask=mask)
    assert predicted["masked"] == mask.count("1")
    assert predicted["chance"]["uniform"] == pytest.approx(100 / 24)
    assert predicted["picture"].startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    ("path", "query", "text"),
    [
        ("/etc/passwd", {}, "no such page"),
        ("/../answers.py", {}, "no such page"),
        ("/api/image", {"image": "0"}, "lacks 'tokenizer'"),
        ("/api/image", {"image": "0", "tokenizer": "other"}, "no tokenizer 'other' here: small"),
        ("/api/image", {"image": "999", "tokenizer": "small"}, "There is no image 999"),
        ("/api/codeword", {"tokenizer": "small", "codeword": "24"}, "numbered from 0 to 23"),
        ("/api/codeword", {"tokenizer": "small", "codeword": "-1"}, "numbered from 0 to 23"),
        ("/api/codewords", {"tokenizer": "small", "sort": "colour", "page": "1"}, "not by 'colour'"),
        ("/api/codewords", {"tokenizer": "small", "sort": "use", "page": "x"}, "'page' must be"),
        ("/picture", {"image": "0", "size": "4000"}, "4000 pixels"),
        ("/picture", {"image": "0", "kind": "codes"}, "no such picture"),
        ("/tiles", {"tokenizer": "small", "codewords": ",".join(["1"] * 81)}, "At most 80"),
        ("/api/predict", {"run": "vit", "image": "0", "mask": "1" * 15}, "4 x 4 digits"),
        ("/api/predict", {"run": "vit", "image": "0", "mask": "0" * 16}, "Nothing is hidden"),
        ("/api/predict", {"run": "vit", "image": "0", "mask": "1" * 16}, "leave some visible"),
        ("/api/predict", {"run": "x", "image": "0", "mask": "01" * 8}, "no ViT 'x'"),
    ],
)
def test_answers__refuse_with_a_sentence(answers: Answers, path: str, query: dict[str, str], text: str) -> None:
    with pytest.raises(Refused, match=text):
        answers.get(path, query)


# ---------------------------------------------------------------------------------------------------------- the server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def page(answers: Answers) -> Iterator[str]:
    server = Server(ExploreConfig(port=free_port(), upload_mb=1))
    server.serve(answers)
    yield f"http://127.0.0.1:{server.server_port}"
    server.close()


def status(address: str, data: bytes | None = None, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_page__serves_no_other_file(page: str, images: Path) -> None:
    assert [status(f"{page}/{name}") for name in ("", "page.js", "base.js", "page.css", "page.html", "atlas.js")] == [
        200
    ] * 6
    files = ("/etc/passwd", str(next(images.rglob("*.png"))), str(Path("pyproject.toml").resolve()), "../answers.py")
    for path in files:
        for text in (path, urllib.parse.quote(path, safe=""), f"static/{path}", f"picture?image={path}&size=16"):
            assert status(f"{page}/{text}") == 404
    assert status(f"{page}/api/other", b"x") == 404


def test_page__answers_only_its_own_pages_under_its_own_names(page: str) -> None:
    for host, code in {"evil.example": 400, "127.0.0.1.evil.example:80": 400, "": 400, "localhost:7860": 200}.items():
        assert status(page, Host=host) == code
    foreign = ("http://evil.example", "null", "http://localhost.evil.example", "http://[1::2]", "http://[", "")
    for origin in foreign:
        for path in ("/", "/api/setup", "/api/upload"):
            assert status(page + path, Host="localhost:7860", Origin=origin) == 403, origin
            assert status(page + path, b"x", Host="localhost:7860", Origin=origin) == 403, origin
    for origin in (page, "http://localhost:7860", "http://[::1]:7860"):
        assert status(page, Origin=origin) == 200
    # A page of another site may link here, and may not show pictures of here.
    assert status(f"{page}/?codeword=3", None, **{"Sec-Fetch-Site": "cross-site"}) == 200
    assert status(f"{page}/api/setup", None, **{"Sec-Fetch-Site": "cross-site"}) == 403


def test_server__has_the_names_of_the_settings() -> None:
    server = Server(ExploreConfig(port=free_port(), allowed_hosts=("proxy.example", "*.lab.example")))
    server.server_close()
    for name, own in {
        "proxy.example": True, "PROXY.example:443": True, "a.lab.example": True, "lab.example": False,
        "xlab.example": False, "a.proxy.example": False, "[::1]:80": True, "[": False, "": False,
    }.items():  # fmt: skip
        assert server.is_own(name) == own, name


def test_page__takes_an_image_and_refuses_others(page: str, images: Path) -> None:
    def upload(data: bytes) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{page}/api/upload", data), timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    code, value = upload(next(images.rglob("*.png")).read_bytes())
    assert code == 200
    assert status(f"{page}/api/image?tokenizer=small&image={value['image']}") == 200
    code, value = upload(b"\x89PNG nonsense")
    assert code == 400
    assert value["error"].startswith("This image cannot be read: ")
    code, value = upload(bytes(2_000_000))
    assert (code, value["error"]) == (413, "This file has more than 1 MB, the limit of --upload-mb.")
    connection = http.client.HTTPConnection(page.removeprefix("http://"), timeout=30)
    connection.putrequest("POST", "/api/upload")
    connection.endheaders()
    assert connection.getresponse().status == 411
    connection.close()


def test_explore__keeps_uploads_in_memory_and_ends_at_sigterm(codebook_run: Path, images: Path, tmp_path: Path) -> None:
    port, log, folder = free_port(), tmp_path / "log", tmp_path / "temporary"
    folder.mkdir()
    words = ["explore", str(codebook_run), "--data", str(images), "--port", str(port)]
    process = forked.start(words, log, {**os.environ, "TMPDIR": str(folder)})
    while not (log.exists() and "Ctrl-C stops" in log.read_text()):
        assert process.is_alive(), log.read_text()
        time.sleep(0.02)
    assert status(f"http://127.0.0.1:{port}/api/upload", next(images.rglob("*.png")).read_bytes()) == 200
    assert list(folder.iterdir()) == []
    process.terminate()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM


def test_explore__lists_the_tokenizer_of_a_codebook_and_its_vit_once(
    codebook_run: Path, vit_run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = pecobook.explore(
        runs=(str(vit_run), str(codebook_run)), data=str(images), port=free_port(), images=1, block=False
    )
    server.close()
    (name,) = server.answers.tokenizers
    assert name == codebook_run.name
    assert [tokenizer for _, tokenizer in server.answers.runs.values()] == [name]
    assert server.answers.tokenizers[name].found.num_images == 1
    assert f"The tokenizer of {vit_run.name} is that of {name}" in capsys.readouterr().err


@pytest.mark.parametrize("run", ["runs/vit", "runs/vit/export"])
def test_load_masked_run__finds_the_tokenizer_from_any_folder(
    codebook_run: Path, vit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    shutil.copytree(codebook_run, tmp_path / "runs" / "codebook")
    shutil.copytree(vit_run, tmp_path / "runs" / "vit")
    config = json.loads((tmp_path / "runs/vit/config.json").read_text())
    moved = {**config, "out": "runs/vit", "tokenizer": "runs/codebook"}
    (tmp_path / "runs/vit/config.json").write_text(json.dumps(moved))
    monkeypatch.chdir(tmp_path / "runs")
    assert torch.equal(load_masked_run(tmp_path / run).codebook, load_masked_run(vit_run).codebook)
    (tmp_path / "runs" / "codebook").rename(tmp_path / "elsewhere")
    moved["tokenizer"] = "./runs/codebook"
    (tmp_path / "runs/vit/config.json").write_text(json.dumps(moved))
    with pytest.raises(WeightsError, match=r"The run '.*' was trained with the tokenizer '\./runs/codebook'"):
        load_masked_run(tmp_path / run)


def test_explore__refuses_a_port_in_use(page: str, codebook_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["explore", str(codebook_run), "--port", page.rpartition(":")[2]])
    assert "give another --port" in capsys.readouterr().err


def test_explore__lists_all_problems(tmp_path: Path) -> None:
    with pytest.raises(PreflightError) as caught:
        pecobook.explore(runs=(str(tmp_path / "none"),), data=str(tmp_path / "nothing"), port=free_port())
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError):
        pecobook.explore(runs=("x",), port=0)
