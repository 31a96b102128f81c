"""The report in a real browser: its atlas answers, and no column is hidden on a phone, no picture sliced on paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pecobook.analysis.atlas import Atlas, as_json, make_atlas, sprite_jpeg
from pecobook.analysis.occurrences import class_shares
from pecobook.analysis.report import Picture, Report, Section, Table, write_report
from tests.analysis.fakes import GreyTokenizer
from tests.analysis.test_atlas import grey_images
from tests.browser import browser, needs_browser

__all__ = ["browser"]
pytestmark = needs_browser


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    tokenizer, images = GreyTokenizer(), torch.cat([grey_images(), torch.zeros(8, 3, 16, 16)])
    labels, classes = torch.tensor([0] * 32 + [1] * 8), ["light", "dark"]
    codes = tokenizer.encode(images)
    shares = class_shares(codes, labels, len(tokenizer.codebook), classes)
    return make_atlas(images, codes, tokenizer.codebook, shares=shares)


@pytest.fixture(scope="module")
def page(browser: Any, atlas: Atlas, tmp_path_factory: pytest.TempPathFactory) -> Any:
    picture = Picture(sprite_jpeg(atlas), "caption", "atlas", title="grey", tiles=as_json(atlas))
    names = ("pixel", "control", "perceptual")
    rows = tuple((f"{title}: linear probe of mean codewords, %", *["66.7 ± 2.3"] * 3) for title in "ab")
    sections = (Section("Atlas", pictures=(picture,)), Section("Table", table=Table(("", *names), rows)))
    file: Path = write_report(tmp_path_factory.mktemp("page"), Report("A report", sections=sections))
    page = browser.new_page(viewport={"width": 390, "height": 800}, reduced_motion="reduce")
    page.set_default_timeout(30_000)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda message: page.errors.append(message.text))
    page.goto(file.as_uri())
    page.wait_for_function("document.querySelector('canvas').width > 300")
    return page


def test_the_atlas_tells_about_the_codeword_under_the_pointer(page: Any, atlas: Atlas) -> None:
    canvas, told = page.locator("canvas"), page.locator("output")
    side = canvas.bounding_box()["width"] / atlas.columns
    canvas.click(position={"x": 1.5 * side, "y": 0.5 * side})
    codeword = atlas.codewords[1]
    assert told.text_content().startswith(f"codeword {codeword}: ")
    canvas.press("ArrowDown")
    assert told.text_content().startswith(f"codeword {atlas.codewords[atlas.columns + 1]}: ")
    for frames in ("use", "place", "colour", "class"):
        page.locator("select").first.select_option(frames)
    assert page.locator("select").nth(1).is_visible()
    before = canvas.screenshot()
    page.get_by_role("button", name="larger").click()
    assert canvas.screenshot() != before
    assert page.errors == []  # the policy of the page allows its script


def test_on_a_phone_every_column_is_in_sight(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("(e => e.scrollWidth - e.clientWidth)(document.querySelector('.scroll'))") == 0
    header = page.locator("thead th").last.bounding_box()
    assert header["x"] + header["width"] <= 390
    assert header["height"] < 40  # the name of the column is not broken


def test_on_paper_no_figure_breaks_and_the_atlas_is_a_picture(page: Any) -> None:
    page.emulate_media(media="print")
    assert page.locator("figure img").is_visible()
    assert not page.locator("canvas").is_visible()
    assert not page.locator(".tools").is_visible()
    style = "getComputedStyle(document.querySelector('figure')).breakInside"
    assert page.evaluate(style) == "avoid"
    page.emulate_media(media="screen")
