"""The page is one file, escapes all contents, and is small enough to send by mail."""

import base64
import dataclasses
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import numpy as np
import pytest
from PIL import Image

from pecobook.analysis import report as module
from pecobook.analysis.report import Picture, Report, Section, Table, fit, render, write_report
from pecobook.errors import PecobookError

EVIL = "<script>alert('&')</script>"


def png(side: int = 40, noise: bool = False) -> bytes:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8) if noise else np.zeros((side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def full(text: str, picture: bytes | None = None) -> Report:
    table = Table((text, "b"), ((text, "1.0"), ("group", ""), ("row", text)), text)
    shown = Picture(picture or png(), text, text, title=text)
    section = Section(
        text, f"{text}\n\nsecond", (shown, shown), table, details=text, details_title=text, side_by_side=True
    )
    return Report(text, text, (text, "two"), ((text, text),), (section,) * 3, text)


class Reader(HTMLParser):
    """Collects tags and everything that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    return reader


def test_every_text_is_escaped() -> None:
    reader = read(render(full(EVIL)))
    assert "script" not in reader.tags
    # Title, heading, summary, facts, sections and the other parts show the text.
    assert "".join(reader.text).count("<script>") >= 20


def test_nothing_is_loaded_from_outside() -> None:
    html = render(full("https://example.org/x.png"))
    assert all(url.startswith(("data:", "#")) for url in read(html).fetched)
    style = re.findall(r"<style>.*?</style>", html, re.S)[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in html


def test_group_rows_span_the_table_and_numbers_stay_with_their_errors() -> None:
    report = dataclasses.replace(full("x"), summary=("higher by 5.9 ± 0.6 points, the control's",))
    html = render(report)
    assert '<th scope="colgroup" colspan="2" class="words">group</th>' in html
    assert "5.9\u00a0±\u00a00.6\u00a0points, the control’s" in html


def test_a_picture_of_tiles_brings_the_one_script_that_the_page_allows() -> None:
    picture = Picture(png(), "", "atlas", tiles={"codeword": [1], "classes": ["</script><b>"]})
    html = render(Report("x", sections=(Section("s", pictures=(picture,)),)))
    script = html[html.rindex("<script>") + len("<script>") : html.rindex("</script>")]
    assert script == (Path(module.__file__).parent / "templates" / "atlas.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'\"" in html
    assert read(html).tags.count("script") == 2  # the data of the tiles, and the script
    assert "<b>" not in html
    assert "script-src" not in render(Report("x", sections=(Section("s", pictures=(Picture(png(), "", "plain"),)),)))


def test_write_report_makes_one_file_and_replaces_it(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "folder"
    first = write_report(out, full("one"))
    second = write_report(out, full("two"))
    assert first == second == out / "report.html"
    assert [path.name for path in out.iterdir()] == ["report.html"]
    assert "<title>two</title>" in second.read_text(encoding="utf-8")


def test_large_pictures_are_halved_until_the_page_fits(tmp_path: Path) -> None:
    report = full("x", png(900, noise=True))
    path = write_report(tmp_path, report, max_bytes=2_000_000)
    assert path.stat().st_size < 2_000_000
    smaller = fit(report, 2_000_000).sections[0].pictures[0]
    assert smaller.size[0] < 900
    assert smaller.display_width == 450  # the displayed size is unchanged
    assert fit(report, 100_000_000) is report
    with pytest.raises(PecobookError, match="pictures"):
        write_report(tmp_path, report, max_bytes=1000)


def test_an_empty_report_is_a_page() -> None:
    assert "<h1>bare</h1>" in render(Report("bare"))


def test_errors_name_the_mistake() -> None:
    with pytest.raises(ValueError, match="cells"):
        Table(("a", "b"), (("only one",),))
    with pytest.raises(PecobookError, match="not a PNG"):
        render(Report("x", sections=(Section("s", pictures=(Picture(b"GIF89a", "cap", "alt"),)),)))


def test_the_template_refuses_undefined_names() -> None:
    class Half:
        title, sections = "half", ()

    with pytest.raises(jinja2.UndefinedError):
        render(Half())  # type: ignore[arg-type]
