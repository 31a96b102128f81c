"""`pecobook explore`: what the page shows, the server, and the privacy of files; the browser: test_explore_page.py."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

import pecobook
from pecobook import cli
from pecobook.analysis.reconstruction import decode_all, encode_all
from pecobook.commands.explore import model
from pecobook.commands.explore.answers import STRIP, THUMBNAIL, UPLOADS, Answers, Images, Refused
from pecobook.commands.explore.server import Server
from pecobook.commands.masked_run import load_masked_run
from pecobook.data.images import open_images
from pecobook.data.views import center_crop
from pecobook.errors import ConfigError, PreflightError, WeightsError
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.settings.explore import ExploreConfig
from pecobook.utils.images import to_float
from tests.analysis.fakes import GreyTokenizer
from tests.runs import codebook_run, vit_run

__all__ = ["codebook_run", "vit_run"]  # the fixtures

CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def indexed(images: Path, codebook_run: Path) -> model.IndexedTokenizer:
    with contextlib.redirect_stderr(io.StringIO()):
        source = open_images(str(images)).evaluation
        return model.index("small", PerceptualTokenizer.from_pretrained(codebook_run), source, 100)


@pytest.fixture(scope="module")
def crops(images: Path, indexed: model.IndexedTokenizer) -> Tensor:
    """Return the indexed images as the tokenizer reads them, uint8 (N, 3, 16, 16)."""
    source = open_images(str(images)).evaluation
    return torch.stack([center_crop(source.read(int(row)), 16) for row in indexed.rows])


def grey(codes: Tensor, labels: list[int] | None = None, levels: int = 64) -> model.IndexedTokenizer:
    """Index made-up codes (N, h, w) of a tokenizer of grey levels."""
    source = SimpleNamespace(labels=None if labels is None else np.array(labels), classes=CLASSES)
    examples = torch.zeros(levels, 3, 4, 4, dtype=torch.uint8)
    rows, tokenizer = np.arange(len(codes)), GreyTokenizer(levels=levels)
    return model.indexed("grey", tokenizer, cast("Any", source), rows, codes.numpy().astype(np.int32), examples)


def test_index__holds_codes_of_all_held_out_images(
    indexed: model.IndexedTokenizer, images: Path, crops: Tensor
) -> None:
    assert len(indexed.codes) == len(open_images(str(images)).evaluation)
    codes = indexed.tokenizer.encode(to_float(crops))
    assert np.array_equal(codes, indexed.codes)
    assert indexed.counts.tolist() == torch.bincount(codes.flatten(), minlength=24).tolist()
    patches = crops.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5)  # (N, h, w, 3, 4, 4)
    for code, example in enumerate(indexed.examples):
        if (codes == code).any():
            assert any(torch.equal(example, patch) for patch in patches[codes == code])
        else:
            assert (example == 128).all()


def test_examples__are_typical_patches() -> None:
    images = torch.full((3, 3, 8, 8), 200, dtype=torch.uint8)
    images[0, :, :4, :4] = 0  # of codeword 1, most of whose patches are bright
    images[1, :, :4, :4] = 190
    codes = torch.ones(3, 2, 2, dtype=torch.long)
    codes[2, 1, 1] = 0
    images[2, :, 4:, 4:] = 7
    examples = model._Examples(3, 4)
    examples.add(images[:2], codes[:2])
    examples.add(images[2:], codes[2:])
    assert [int(patch.unique()) for patch in examples.patches] == [7, 190, 128]  # the mean before the last image is 174


def test_encode_image__equals_the_tokenizer(indexed: model.IndexedTokenizer, crops: Tensor) -> None:
    encoded = model.encode_image(indexed.tokenizer, crops[1])
    assert np.array_equal(encoded.codes, indexed.codes[1])
    x = to_float(crops[1])[None]
    restored = decode_all(indexed.tokenizer, encode_all(indexed.tokenizer, x))
    assert torch.equal(encoded.restored, model.to_picture(restored[0]))
    error = (x - restored).abs()[0].mean(0)
    assert torch.equal(encoded.error[2], model.to_picture(error / error.max()))
    values = model.image_values(indexed, encoded)
    assert values["codes"] == encoded.codes.tolist()
    assert values["distinct"] == len(np.unique(encoded.codes))
    assert values["psnr"] == pytest.approx(10 * np.log10(1 / float((x - restored).square().mean())), abs=0.06)
    colour = ",".join(str(part) for part in indexed.colours[encoded.codes[2, 1]])
    assert values["colours"][2][1] == f"rgb({colour})"


def test_codeword_values__count_images_places_and_neighbours(indexed: model.IndexedTokenizer) -> None:
    code = int(indexed.counts.argmax())
    info = model.codeword_values(indexed, code)
    has = indexed.codes == code
    assert (info["count"], info["images"]) == (has.sum(), has.any((1, 2)).sum())
    assert (info["rank"], info["share"]) == (1, 100 * has.mean())
    assert info["places"] == has.sum(0).tolist()
    row_of = {int(row): place for place, row in enumerate(indexed.rows)}
    assert len(info["exemplars"]) == min(model.EXEMPLARS, info["count"])
    for one in info["exemplars"]:
        assert has[row_of[one["image"]], one["row"], one["column"]]
        assert one["class"] == CLASSES[indexed.labels[row_of[one["image"]]]]  # type: ignore[index]
    book = indexed.tokenizer.codebook
    used = [k for k in torch.cdist(book[code][None], book)[0].argsort().tolist() if k != code and indexed.counts[k] > 0]
    assert [one["codeword"] for one in info["neighbours"]] == used[: model.NEIGHBOURS]
    assert [one["count"] for one in info["neighbours"]] == indexed.counts[used[: model.NEIGHBOURS]].tolist()


def test_codeword_values__of_an_unused_codeword_have_neighbours_alone() -> None:
    codes = torch.zeros(2, 4, 4, dtype=torch.long)
    codes[0, 0, 0] = 63  # all codewords between are unused
    indexed = grey(codes)
    assert [one["codeword"] for one in model.codeword_values(indexed, 0)["neighbours"]] == [63]
    info = model.codeword_values(indexed, 20)
    assert (info["count"], info["rank"], info["exemplars"], info["labelled"]) == (0, None, [], False)
    assert [one["codeword"] for one in info["neighbours"]] == [0, 63]


def test_codeword_values__rank_classes_by_lift_where_it_is_evidence() -> None:
    codes = torch.zeros(300, 2, 2, dtype=torch.long)
    labels = [0] * 200 + [1] * 50 + [2] * 50
    codes[200:240, 0, 0] = 7  # 40 of the 50 images of green
    codes[250:300, 0, 0] = 7  # all 50 of red
    codes[:10, 0, 0] = 7  # 10 of the 200 of blue
    info = model.codeword_values(grey(codes, labels), 7)
    assert [(one["class"], one["images"], one["size"]) for one in info["classes"]] == [
        ("red", 50, 50),
        ("green", 40, 50),
    ]
    first = info["classes"][0]
    assert (first["share"], first["base"]) == (pytest.approx(50), pytest.approx(100 / 6))
    assert first["lift"] == pytest.approx(3)
    assert info["classes_seen"] == 3
    assert model.codeword_values(grey(codes, labels), 0)["classes"] == []  # in all images


def test_codeword_list__sorts_all_codewords() -> None:
    codes = torch.zeros(40, 2, 2, dtype=torch.long)
    codes[:, 0, 0] = 5  # always at the first place
    codes[:20, 1, 1] = 9  # in all images of the first class, and in no other
    codes[:5, 0, 1] = 11  # too few patches for purity and place
    indexed = grey(codes, [0] * 20 + [1] * 20, levels=200)

    def first(sort: str, page: int = 1) -> list[tuple[Any, ...]]:
        listed = model.codeword_list(indexed, sort, page)
        assert (listed["pages"], listed["total"], listed["used"]) == (3, 200, 4)
        return [(one["codeword"], one["count"], one["value"], one["class"]) for one in listed["codewords"]]

    assert [row[:2] for row in first("use")[:5]] == [(0, 95), (5, 40), (9, 20), (11, 5), (1, 0)]
    assert first("lift")[:2] == [(9, 20, 2.0, "blue"), (0, 95, None, "")]  # 11 has five images of blue: p = 0.03
    assert first("purity")[:3] == [(9, 20, 100.0, "blue"), (0, 95, 63.2, "green"), (5, 40, 50.0, "blue")]
    assert [row[::2] for row in first("place")[:3]] == [
        (
            5,
            100.0,
        ),
        (9, 100.0),
        (0, 42.1),
    ]
    assert [row[0] for row in first("number", 3)] == list(range(160, 200))
    assert model.codeword_list(indexed, "use", 99)["page"] == 3


def test_codeword_list__without_labels_is_sorted_by_use() -> None:
    indexed = grey(torch.arange(16).view(1, 4, 4) // 8)
    for sort in model.SORTS:
        assert [one["codeword"] for one in model.codeword_list(indexed, sort, 1)["codewords"]][:3] == [0, 1, 2]


def test_tiles__are_a_decoded_patch_beside_an_example(indexed: model.IndexedTokenizer) -> None:
    tiles = model.tiles(indexed, [3, 20])
    field = model.to_picture(decode_all(indexed.tokenizer, torch.full((1, 3, 3), 20)))[0]
    assert tiles.shape == (2, 3, 4, 8)
    assert torch.equal(tiles[1, :, :, :4], field[:, 4:8, 4:8])
    assert torch.equal(tiles[0, :, :, 4:], indexed.examples[3])


def test_code_colours__are_similar_for_similar_codewords() -> None:
    line = torch.linspace(0, 1, 9)[:, None] * torch.tensor([[3.0, 1.0, 0.0, 2.0]])
    colours = model.code_colours(line)
    assert colours.shape == (9, 3)
    first = colours[:, 0].astype(int)
    assert (first[0], first[-1]) in ((26, 242), (242, 26))
    assert len(set(np.sign(np.diff(first)))) == 1
    assert model.code_colours(torch.randn(5, 1)).shape == (5, 3)


def test_predict__changes_only_masked_patches(indexed: model.IndexedTokenizer, vit_run: Path, crops: Tensor) -> None:
    run = load_masked_run(vit_run)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 2] = mask[3, 0] = True
    image = crops[0]
    prediction = model.predict(run, image, mask)
    is_hidden = mask.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(prediction.picture[:, ~is_hidden], image[:, ~is_hidden])
    assert not torch.equal(prediction.picture[:, is_hidden], image[:, is_hidden])
    x = to_float(image)[None]
    with torch.inference_mode():
        probabilities = run((x), mask[None]).softmax(1)
    assert torch.equal(prediction.codes, run.encode(x)[0])
    assert torch.equal(prediction.top[:, 0], probabilities.argmax(1))
    assert torch.allclose(prediction.probabilities, probabilities.sort(descending=True).values[:, :5])
    guess = prediction.codes.clone()
    guess[mask] = prediction.top[:, 0]
    decoded = model.to_picture(decode_all(run, guess[None])[0])
    assert torch.equal(prediction.picture[:, is_hidden], decoded[:, is_hidden])


def test_prediction_values__count_what_is_right() -> None:
    mask = torch.tensor([[True, False], [True, True]])
    top = torch.tensor([[4, 1], [5, 6], [8, 9]])
    prediction = model.Prediction(torch.zeros(3, 4, 4), torch.tensor([[4, 0], [6, 7]]), top, torch.full((3, 2), 0.25))
    values = model.prediction_values(prediction, mask)
    assert (values["masked"], values["right"], values["right_of_top"]) == (3, 1, 2)
    assert values["tokens"][1] == {"row": 1, "column": 0, "code": 6, "top": [[5, 0.25], [6, 0.25]]}


def test_chance_values__leave_out_the_image_itself() -> None:
    codes = torch.tensor([[[1, 2]], [[1, 3]], [[1, 2]], [[4, 3]]])
    indexed, mask = grey(codes), torch.tensor([[True, True]])
    assert model.chance_values(indexed, codes[1], mask, None)["place"] == 50  # the most frequent are 1 and 2
    assert model.chance_values(indexed, codes[0], mask, 0)["place"] == 50  # without it 1 and 3
    assert model.chance_values(indexed, codes[1], mask, 1) == {"uniform": 100 / 64, "place": 50}
    assert (
        model.chance_values(indexed, torch.zeros(3, 3, dtype=torch.long), torch.ones(3, 3).bool(), None)["place"]
        is None
    )


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
    assert [status(f"{page}/{name}") for name in ("", "page.js", "base.js", "page.css", "page.html")] == [200] * 5
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
    port = free_port()
    words = [sys.executable, "-m", "pecobook", "explore", str(codebook_run), "--data", str(images), "--port", str(port)]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, cwd=tmp_path) as server:
        assert server.stderr is not None
        while b"Ctrl-C stops" not in server.stderr.readline():
            assert server.poll() is None
        assert status(f"http://127.0.0.1:{port}/api/upload", next(images.rglob("*.png")).read_bytes()) == 200
        assert list(tmp_path.iterdir()) == []
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 128 + signal.SIGTERM


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
