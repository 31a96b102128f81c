"""`pecobook explore`: the contents of the page, the page in a real browser, and the privacy of files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import pecobook
from pecobook import cli
from pecobook.analysis.reconstruction import decode_all, encode_all
from pecobook.commands.explore import model
from pecobook.commands.masked_run import load_masked_run
from pecobook.data.decode import decode
from pecobook.data.images import open_images
from pecobook.errors import ConfigError, PreflightError, WeightsError
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.utils.images import to_float
from tests import forked
from tests.analysis.fakes import GreyTokenizer
from tests.runs import codebook_run, vit_run

__all__ = ["codebook_run", "vit_run"]  # the fixtures

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def indexed(images: Path, codebook_run: Path) -> model.IndexedTokenizer:
    with contextlib.redirect_stderr(io.StringIO()):
        return model.index("small", PerceptualTokenizer.from_pretrained(codebook_run), open_images(str(images)), 100)


def test_index__holds_codes_of_all_held_out_images(indexed: model.IndexedTokenizer, images: Path) -> None:
    assert len(indexed.images) == len(indexed.codes) == len(open_images(str(images)).evaluation)
    assert torch.equal(indexed.tokenizer.encode(to_float(indexed.images)), indexed.codes)
    assert indexed.counts.sum() == indexed.codes.numel()


def test_encode_image__equals_the_tokenizer(indexed: model.IndexedTokenizer) -> None:
    encoded = model.encode_image(indexed, indexed.images[1])
    assert torch.equal(encoded.codes, indexed.codes[1])
    x = to_float(indexed.images[1])[None]
    restored = model.to_picture(decode_all(indexed.tokenizer, encode_all(indexed.tokenizer, x))[0])
    assert np.array_equal(encoded.restored, restored)
    assert encoded.original.shape == encoded.tokens.shape == encoded.restored.shape == (448, 448, 3)


@pytest.mark.parametrize(
    ("x", "y", "row", "column"), [(0, 0, 0, 0), (447, 447, 3, 3), (112, 111, 0, 1), (300, 230, 2, 2)]
)
def test_code_at__is_the_token_under_the_pixel(
    indexed: model.IndexedTokenizer, x: int, y: int, row: int, column: int
) -> None:
    encoded = model.encode_image(indexed, indexed.images[0])
    assert model.code_at(encoded, x, y) == int(encoded.codes[row, column])


def test_codeword_info__counts_images_classes_and_neighbours(indexed: model.IndexedTokenizer) -> None:
    code = int(indexed.counts.argmax())
    info = model.codeword_info(indexed, code, ("blue", "green", "red"), max_patches=3)
    assert info.row.count == int((indexed.codes == code).sum())
    assert info.row.images == int((indexed.codes == code).flatten(1).any(1).sum())
    assert info.row.positions.shape == (4, 4)
    assert info.row.positions[1, 2] == (indexed.codes[:, 1, 2] == code).sum()
    assert sum(count for _, count, _ in info.classes) == info.row.count
    assert sum(share for *_, share in info.classes) == pytest.approx(100)
    assert len(info.patches) == min(3, info.row.count)
    book = indexed.tokenizer.codebook
    used = [k for k in torch.cdist(book[code][None], book)[0].argsort().tolist() if k != code and indexed.counts[k] > 0]
    assert [codeword for codeword, _ in info.nearest] == used[: len(info.nearest)]
    unused = int(np.flatnonzero(indexed.counts == 0)[0]) if (indexed.counts == 0).any() else None
    if unused is not None:
        assert model.codeword_info(indexed, unused, ()).patches == []


def test_position_picture__is_white_at_the_most_frequent_position() -> None:
    picture = model.position_picture(np.array([[0, 1], [2, 4]]))
    assert picture.shape == (448, 448, 3)
    assert [picture[100, 100, 0], picture[100, 300, 1], picture[300, 100, 2], picture[300, 300, 0]] == [0, 64, 128, 255]
    assert not model.position_picture(np.zeros((2, 2), dtype=np.int64)).any()


def test_codeword_info__finds_used_neighbours_among_all_codewords() -> None:
    codes = torch.zeros(2, 4, 4, dtype=torch.long)
    codes[0, 0, 0] = 63  # all codewords between are unused
    counts = torch.bincount(codes.flatten(), minlength=64).numpy()
    pixels = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    indexed = model.IndexedTokenizer("grey", GreyTokenizer(levels=64), pixels, codes, None, counts, torch.zeros(64, 3))
    assert [codeword for codeword, _ in model.codeword_info(indexed, 0, ()).nearest] == [63]


def test_code_colours__are_similar_for_similar_codewords() -> None:
    line = torch.linspace(0, 1, 9)[:, None] * torch.tensor([[3.0, 1.0, 0.0, 2.0]])
    colours = model.code_colours(line)
    assert colours.shape == (9, 3)
    assert 0 <= float(colours.min()) <= float(colours.max()) <= 1
    first = colours[:, 0]
    assert torch.equal(first.argsort(), torch.arange(9)) or torch.equal(first.argsort(), torch.arange(8, -1, -1))
    assert model.code_colours(torch.randn(5, 1)).shape == (5, 3)


def test_painted_patches__need_a_fifth_of_a_patch() -> None:
    strokes = np.zeros((40, 40), dtype=np.uint8)
    strokes[:10, :2] = 255  # exactly a fifth of the first patch
    strokes[20:30, 10:11] = 9  # a tenth of another
    assert model.painted_patches(strokes, (4, 4)).nonzero().tolist() == [[0, 0]]


def test_predict__changes_only_masked_patches(indexed: model.IndexedTokenizer, vit_run: Path) -> None:
    run = load_masked_run(vit_run)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[1, 2] = True
    hidden, predicted, accuracy = model.predict(run, indexed.images[0], mask)
    assert (hidden[112:224, 224:336] == 128).all()
    assert (hidden[:112] != 128).any()
    assert predicted.shape == hidden.shape
    assert accuracy in (0.0, 100.0)


# ------------------------------------------------------------------------------------------------------------ the page


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def page(images: Path, codebook_run: Path, vit_run: Path) -> Iterator[tuple[str, Any]]:
    pytest.importorskip("gradio")
    port = free_port()
    with contextlib.redirect_stderr(io.StringIO()):
        blocks = pecobook.explore(
            runs=(str(codebook_run), str(vit_run)), data=str(images), port=port, upload_mb=1, block=False
        )
    yield f"http://127.0.0.1:{port}", blocks
    blocks.close()


def status(address: str, data: bytes | None = None, **headers: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_page__serves_no_other_file(page: tuple[str, Any], images: Path) -> None:
    address, _ = page
    assert status(address) == 200
    for path in (
        "/etc/passwd",
        str(next(images.rglob("*.png"))),
        str(Path("pyproject.toml").resolve()),
        "../../etc/passwd",
    ):
        assert status(f"{address}/gradio_api/file={urllib.parse.quote(path)}") in (403, 404)


def test_page__answers_only_its_own_pages_under_its_own_names(page: tuple[str, Any]) -> None:
    for host, code in {"evil.example": 400, "127.0.0.1.evil.example:80": 400, "localhost:7860": 200}.items():
        assert status(page[0], Host=host) == code
    foreign = ("http://evil.example", "null", "http://localhost.evil.example", "http://[1::2]", "http://[", "")
    for origin in foreign:
        for path in ("/", "/config", "/gradio_api/upload"):
            assert status(page[0] + path, Host="localhost:7860", Origin=origin) == 403, origin
            assert status(page[0] + path, b"x", Host="localhost:7860", Origin=origin) == 403, origin
    for origin in (page[0], "http://localhost:7860", "http://[::1]:7860"):
        assert status(page[0], Origin=origin) == 200


def test_page__keeps_a_large_image_reduced(page: tuple[str, Any]) -> None:
    from pecobook.commands.explore.page import Page

    instance = Page.__new__(Page)
    instance.largest_side = 64
    assert instance._reduced(torch.zeros(3, 4000, 1000, dtype=torch.uint8)).shape == (256, 64, 3)
    assert instance._reduced(torch.zeros(3, 60, 1000, dtype=torch.uint8)).shape == (60, 1000, 3)


def forget_temporary_folder() -> None:
    """Let the module tempfile read TMPDIR again."""
    tempfile.tempdir = None


def test_explore__deletes_uploads_at_sigterm(codebook_run: Path, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    words, log = ["explore", str(codebook_run), "--data", str(images), "--port", str(free_port())], tmp_path / "log"
    server = forked.start(words, log, {**os.environ, "TMPDIR": str(tmp_path)}, prepare=forget_temporary_folder)
    while not log.exists() or "Ctrl-C stops" not in log.read_text():
        assert server.exitcode is None
        time.sleep(0.05)
    folders = list(tmp_path.glob("pecobook-uploads-*"))
    assert len(folders) == 1
    (folders[0] / "a.png").touch()
    server.terminate()
    server.join(60)
    assert server.exitcode == 128 + signal.SIGTERM
    assert not folders[0].exists()


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


def test_page__shows_a_selected_image_of_the_source(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from pecobook.commands.explore.page import Page

    files = sorted(images.rglob("*.png"))[:3]
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for number, file in enumerate(files):
            (tmp_path / split / f"{number}.png").write_bytes(file.read_bytes())
    (tmp_path / "test" / "3.png").write_bytes(b"\x89PNG nonsense")
    splits = open_images(str(tmp_path))
    small, large = (GreyTokenizer(levels=64, stride=4, image_size=size) for size in (8, 32))
    nothing = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 2, 2, dtype=torch.long)
    indexed = [
        model.IndexedTokenizer(name, tokenizer, *nothing, None, np.zeros(64, dtype=np.int64), torch.zeros(64, 3))
        for name, tokenizer in (("small", small), ("large", large))
    ]
    page = Page(indexed, {}, splits)
    assert page.largest_side == 64
    assert len(page.thumbnails) == 3
    for position, number in enumerate(page.thumbnails):
        uploaded = decode((tmp_path / "test" / f"{number}.png").read_bytes(), name="x")
        selected = page.read_held_out(SimpleNamespace(index=position))
        assert np.array_equal(selected, uploaded.permute(1, 2, 0).numpy())
        encoded = model.encode_image(indexed[1], torch.from_numpy(selected).permute(2, 0, 1))
        assert torch.equal(encoded.codes, model.encode_image(indexed[1], uploaded).codes)


def test_page__refuses_a_large_upload(page: tuple[str, Any]) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        + bytes(2_000_000)
        + b"\r\n--x--\r\n"
    )
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert status(f"{page[0]}/gradio_api/upload", body, **kind) == 413


def test_page__reads_only_uploads(page: tuple[str, Any], images: Path) -> None:
    import gradio

    from pecobook.commands.explore.page import Page

    instance = Page.__new__(Page)
    outside = next(images.rglob("*.png"))
    with pytest.raises(gradio.Error, match="Only uploaded images"):
        instance.read_upload(str(outside))
    inside = Path(os.environ["GRADIO_TEMP_DIR"]) / "a.png"
    inside.write_bytes(outside.read_bytes())
    instance.largest_side, instance.source = 1000, open_images(str(images)).evaluation
    assert instance.read_upload(str(inside)).shape == (40, 48, 3)
    inside.write_bytes(b"\x89PNG nonsense")
    with pytest.raises(gradio.Error, match="cannot be read"):
        instance.read_upload(str(inside))


def test_explore__refuses_a_port_in_use(
    page: tuple[str, Any], codebook_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["explore", str(codebook_run), "--port", page[0].rpartition(":")[2]])
    assert "give another --port" in capsys.readouterr().err


def test_explore__lists_all_problems(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    with pytest.raises(PreflightError) as caught:
        pecobook.explore(runs=(str(tmp_path / "none"),), data=str(tmp_path / "nothing"), port=free_port())
    assert len(caught.value.problems) == 2
    with pytest.raises(ConfigError):
        pecobook.explore(runs=("x",), port=0)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_page__works_in_a_browser(page: tuple[str, Any], images: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    requests: list[str] = []
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1400, "height": 1400})
        tab.set_default_timeout(60_000)
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page[0])
        tab.wait_for_selector("#token-map img")
        tab.locator("#token-map img").click(position={"x": 20, "y": 20})
        tab.wait_for_selector("#patches img")
        assert re.search(r"Codeword \d+: .* at \d+ of 16 positions", tab.locator("#about").inner_text())
        tab.wait_for_selector("#positions img")
        before = tab.locator("#image img").get_attribute("src")
        tab.locator("#upload input[type=file]").set_input_files(str(next(images.rglob("*.png"))))
        tab.wait_for_function("before => document.querySelector('#image img').src !== before", arg=before)
        tab.locator("#compare").click()
        tab.wait_for_selector("#slider img")
        tab.locator("#ask").click()
        tab.wait_for_selector("text=Nothing is painted")
        tab.locator("#take").click()
        tab.wait_for_timeout(3000)
        canvas = tab.locator("#editor canvas").first
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        for step in range(8):
            tab.mouse.move(box["x"] + box["width"] * (0.4 + 0.02 * step), box["y"] + box["height"] * 0.45)
            if step == 0:
                tab.mouse.down()
        tab.mouse.up()
        tab.wait_for_timeout(500)
        tab.locator("#ask").click()
        tab.wait_for_selector("text=patches masked")
        bad = {"name": "bad.png", "mimeType": "image/png", "buffer": b"\x89PNG nonsense"}
        tab.locator("#upload input[type=file]").set_input_files(bad)
        tab.wait_for_selector("text=cannot be read")
        browser.close()
    hosts = {urllib.parse.urlsplit(url).hostname for url in requests if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}
