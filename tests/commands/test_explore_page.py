"""The explorer's page in a real browser: click, keys, addresses, the back button, and the width of a phone."""

from __future__ import annotations

import contextlib
import io
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pecobook.commands.explore import model
from pecobook.commands.explore.answers import Answers
from pecobook.commands.explore.server import Server
from pecobook.commands.masked_run import load_masked_run
from pecobook.data.images import open_images
from pecobook.models.tokenizer import PerceptualTokenizer
from pecobook.settings.explore import ExploreConfig
from tests.analysis.fakes import GreyTokenizer
from tests.browser import browser, needs_browser
from tests.commands.test_explore_server import free_port

__all__ = ["browser"]  # the fixture

pytestmark = needs_browser


@pytest.fixture(scope="module")
def answers(codebook_run: Path, vit_run: Path, images: Path) -> Answers:
    """Answer with two tokenizers, of 4 x 4 and of 2 x 2 tokens."""
    source = open_images(str(images)).train
    tokenizers = {
        "codebook": PerceptualTokenizer.from_pretrained(codebook_run),
        "grey": GreyTokenizer(levels=16, stride=8, image_size=16),
    }
    with contextlib.redirect_stderr(io.StringIO()):
        indexed = [model.index(name, tokenizer, source, 100) for name, tokenizer in tokenizers.items()]
    return Answers(indexed, {"vit": (load_masked_run(vit_run), "codebook")}, source, upload_mb=1)


class Tab:
    """A tab of the browser, and what it asked for."""

    def __init__(self, browser: Any, server: Server, **options: Any) -> None:
        self.base = f"http://127.0.0.1:{server.server_port}/"
        self.page = browser.new_page(**{"viewport": {"width": 1280, "height": 800}, **options})
        self.page.set_default_timeout(30_000)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def open(self, query: str = "") -> Any:
        self.page.goto(self.base + query)
        self.page.wait_for_selector("#views a")
        return self.page

    @property
    def state(self) -> dict[str, str]:
        return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.page.url).query))

    def heading(self, text: str) -> None:
        self.page.wait_for_function("text => document.querySelector('#answer h2')?.textContent === text", arg=text)


@pytest.fixture
def tab(browser: Any, answers: Answers) -> Iterator[Tab]:
    server = Server(ExploreConfig(port=free_port(), upload_mb=1))
    server.serve(answers)
    tab = Tab(browser, server)
    yield tab
    assert tab.errors == []
    assert {urllib.parse.urlsplit(url).hostname for url in tab.requests if not url.startswith("data:")} == {"127.0.0.1"}
    tab.page.close()
    server.close()


def code_of(answers: Answers, name: str, image: str, row: int, column: int) -> int:
    tokenizer = answers.tokenizers[name]
    place = tokenizer.rows.tolist().index(int(image))
    return int(tokenizer.codes[place, row, column])


def test_page__a_click_shows_the_codeword_and_marks_the_token(tab: Tab, answers: Answers) -> None:
    page = tab.open("?image=5")
    page.locator('#map [data-token="1,2"]').click()
    code = code_of(answers, "codebook", "5", 1, 2)
    tab.heading(f"Codeword {code}")
    assert (tab.state["codeword"], tab.state["token"]) == (str(code), "1,2")
    values = model.codeword_values(answers.tokenizers["codebook"], code)
    assert page.locator("#answer .head p").inner_text().startswith(f"{values['count']} patch")
    assert page.locator(".exemplars a").count() == min(30, values["count"])
    places = page.evaluate("""() => ['map', 'original', 'restored', 'error'].map((id) => {
        const box = document.querySelector(`#${id} .mark`).getBoundingClientRect();
        const frame = document.getElementById(id).getBoundingClientRect();
        return [(box.left - frame.left) / frame.width, (box.top - frame.top) / frame.height].map((x) => x.toFixed(2));
    })""")
    assert places == [["0.50", "0.25"]] * 4
    # The outline of an exemplar lies on its patch.
    first = values["exemplars"][0]
    place = page.evaluate("""() => {
        const image = document.querySelector('.exemplars img').getBoundingClientRect();
        const box = document.querySelector('.exemplars i').getBoundingClientRect();
        return [(box.top - image.top) / image.height, (box.left - image.left) / image.width, box.width / image.width];
    }""")
    assert place == pytest.approx([first["row"] / 4, first["column"] / 4, 0.25], abs=0.01)
    assert page.locator(".exemplars a").first.bounding_box()["width"] >= 96
    same = page.locator("#map .same").count()
    assert same == sum(
        code_of(answers, "codebook", "5", row, column) == code for row in range(4) for column in range(4)
    )
    page.locator("#restored").click(position={"x": 3, "y": 3})  # a click on another picture chooses too
    tab.heading(f"Codeword {code_of(answers, 'codebook', '5', 0, 0)}")


def test_page__keys_do_what_the_mouse_does(tab: Tab, answers: Answers) -> None:
    page = tab.open("?image=5")
    page.locator("#map button").first.focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowLeft", "ArrowUp", "End", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    tab.heading(f"Codeword {code_of(answers, 'codebook', '5', 1, 3)}")
    assert tab.state["token"] == "1,3"
    assert page.evaluate("document.activeElement.ariaLabel") == (
        f"row 2, column 4: codeword {code_of(answers, 'codebook', '5', 1, 3)}"
    )
    assert page.locator("#map [role=grid]").get_attribute("aria-label") == "Token map"
    assert page.locator("#map button[tabindex='0']").count() == 1
    shown = {"image": "#map button", "codewords": "#list a", "atlas": ".atlas canvas", "mask": "#predicted button"}
    for view, ready in shown.items():  # everything has a name
        tab.open(f"?view={view}&codeword=3")
        page.wait_for_selector(ready)
        unnamed = page.evaluate("""() => [...document.querySelectorAll('button, a, input, select, img, canvas')].filter(
            (one) => !(one.alt || one.ariaLabel || one.textContent.trim() || one.labels?.length
                       || one.querySelector('[alt], [aria-label]'))).map((one) => one.outerHTML)""")
        assert unnamed == []


def test_page__has_addresses_and_a_way_back(tab: Tab, answers: Answers) -> None:
    used = answers.tokenizers["codebook"].counts.argmax()
    page = tab.open(f"?codeword={used}")
    tab.heading(f"Codeword {used}")
    near = model.codeword_values(answers.tokenizers["codebook"], int(used))["neighbours"][0]["codeword"]
    page.locator(".near a").first.click()
    tab.heading(f"Codeword {near}")
    assert page.title() == f"Codeword {near} · pecobook explore"
    page.go_back()
    tab.heading(f"Codeword {used}")
    page.go_forward()
    tab.heading(f"Codeword {near}")
    first = page.locator(".exemplars a").first
    address = first.get_attribute("href")
    first.click()  # opens the image, with the token marked
    page.wait_for_selector("#map .mark")
    assert tab.state["image"] == dict(urllib.parse.parse_qsl(address[1:]))["image"]
    tab.heading(f"Codeword {near}")
    page.reload()
    page.wait_for_selector("#map .mark")
    tab.heading(f"Codeword {near}")
    tab.open("?codeword=999")
    page.wait_for_selector("#message:has-text('numbered from 0 to 23')")
    page.locator("#number").fill("7")
    page.keyboard.press("Enter")
    tab.heading("Codeword 7")
    assert page.locator("#message").is_hidden()


def test_page__keeps_nothing_of_another_image_or_tokenizer(tab: Tab, answers: Answers) -> None:
    page = tab.open("?image=5")
    page.locator('#map [data-token="3,2"]').click()
    page.wait_for_selector("#answer h2")
    page.locator("#tokenizer").select_option("grey")  # of 2 x 2 tokens: the same part of the image
    tab.heading(f"Codeword {code_of(answers, 'grey', '5', 1, 1)}")
    assert (tab.state["token"], tab.state["tokenizer"]) == ("1,1", "grey")
    page.wait_for_function("() => document.querySelectorAll('#map button').length === 4")
    page.locator("#other").select_option("codebook")
    page.wait_for_selector("#restored .other")
    page.locator("#slider").fill("25")
    assert page.locator("#restored .other").evaluate("one => one.style.clipPath") == "inset(0px 0px 0px 75%)"
    page.locator("#thumbnails button[aria-pressed=false]").first.click()
    page.wait_for_selector("#answer p.quiet")
    assert page.locator("#answer h2, #answer a, .mark").count() == 0
    assert "codeword" not in tab.state


def test_page__lists_all_codewords(tab: Tab, answers: Answers) -> None:
    page = tab.open("?view=codewords&tokenizer=grey")
    for sort in ("use", "lift", "purity", "place", "number"):
        page.locator("#sort").select_option(sort)
        expected = [one["codeword"] for one in model.codeword_list(answers.tokenizers["grey"], sort, 1)["codewords"]]
        page.wait_for_function(
            "codes => [...document.querySelectorAll('#list a')].map((one) => +one.dataset.codeword).join() === codes",
            arg=",".join(map(str, expected)),
        )
    page.locator('#list [data-codeword="9"]').click()
    tab.heading("Codeword 9")
    assert page.locator("#list [aria-current]").get_attribute("data-codeword") == "9"
    assert tab.state["view"] == "codewords"


def test_page__opens_codewords_of_the_atlas(tab: Tab, answers: Answers) -> None:
    page = tab.open("?view=atlas")
    canvas = page.locator(".atlas canvas")
    page.wait_for_function("() => document.querySelector('.atlas canvas')?.clientHeight > 100")
    atlas = model.atlas(answers.tokenizers["codebook"])
    width = canvas.bounding_box()["width"]
    cell = width / atlas.columns
    canvas.click(position={"x": 1.5 * cell, "y": 0.5 * cell})
    tab.heading(f"Codeword {atlas.codewords[1]}")
    assert tab.state["view"] == "atlas"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    tab.heading(f"Codeword {atlas.codewords[atlas.columns + 1]}")
    near = page.locator(".near a").first
    codeword = near.inner_text().strip()
    near.click()  # marks the neighbour in the atlas
    page.wait_for_selector(f".atlas output:has-text('codeword {codeword}:')")


def test_page__predicts_what_is_painted(tab: Tab, answers: Answers) -> None:
    page = tab.open("?view=mask&image=5")
    page.wait_for_selector("#predicted .hole")  # a mask of training stands there at first
    page.locator("#clear").click()
    page.wait_for_selector("#message:has-text('Nothing is hidden')")
    start, end = (page.locator(f'#paint [data-token="{token}"]').bounding_box() for token in ("1,1", "1,3"))
    page.mouse.move(start["x"] + 5, start["y"] + 5)
    page.mouse.down()
    page.mouse.move(end["x"] + 5, end["y"] + 5, steps=12)
    page.mouse.up()
    page.wait_for_function("() => document.querySelectorAll('#predicted .hole').length === 3")
    assert tab.state["mask"] == "0000011100000000"
    assert page.locator("#message").is_hidden()
    page.locator('#paint [data-token="0,0"]').focus()
    page.keyboard.press("Space")
    page.wait_for_function("() => document.querySelectorAll('#predicted .hole').length === 4")
    page.locator('#predicted [data-token="1,2"]').click()
    tab.heading("The patch at row 2, column 3")
    query = {"run": "vit", "image": "5", "mask": tab.state["mask"]}
    values = answers._predict(query)
    top = next(one for one in values["tokens"] if (one["row"], one["column"]) == (1, 2))
    shown = [row.inner_text() for row in page.locator(".top tbody tr").all()]
    assert len(shown) == 5
    assert all(f"codeword {code}" in text for (code, _), text in zip(top["top"], shown, strict=True))
    assert f"codeword {top['code']}" in page.locator("#answer .head").inner_text()
    assert f"{values['right']} (" in page.locator("#told").inner_text()
    page.locator(".top a").first.click()
    tab.heading(f"Codeword {top['top'][0][0]}")


def test_page__takes_another_image_after_an_unreadable_one(tab: Tab, images: Path) -> None:
    page = tab.open()
    bad = {"name": "bad.png", "mimeType": "image/png", "buffer": b"\x89PNG nonsense"}
    page.locator("#upload").set_input_files(bad)
    page.wait_for_selector("#message:has-text('This image cannot be read')")
    page.locator("#upload").set_input_files({**bad, "buffer": bytes(1_000_001)})
    page.wait_for_selector("#message:has-text('more than 1 MB')")
    page.locator("#upload").set_input_files(str(next(images.rglob("*.png"))))
    page.wait_for_selector("#about:has-text('your image')")
    assert page.locator("#message").is_hidden()
    assert tab.state["image"].startswith("upload-")
    tab.open("?image=upload-gone")
    page.wait_for_selector("#message:has-text('upload it again')")


def test_page__on_a_phone_the_answer_follows_the_tap(tab: Tab, browser: Any, answers: Answers) -> None:
    page = tab.open("?image=5")
    tab.page.set_viewport_size({"width": 390, "height": 844})
    for query, target, marked in (
        ("?image=5", '#map [data-token="0,1"]', "#map .mark"),
        ("?image=5", '#map [data-token="3,3"]', "#map .mark"),
        ("?view=codewords", "#list li:nth-child(5) a", "#list [aria-current]"),
        ("?view=mask&image=5", "#predicted .hole >> nth=2", "#predicted .mark"),
    ):
        tab.open(query)
        page.locator(target).click()
        page.wait_for_selector(marked)
        page.wait_for_selector("#answer h2")
        heading, mark = (page.locator(name).bounding_box() for name in ("#answer h2", marked))
        assert heading["y"] + heading["height"] < 844, query
        assert -10 <= mark["y"] < heading["y"], query
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, query
