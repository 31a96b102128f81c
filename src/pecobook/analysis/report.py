"""Reports as one self-contained HTML file: no network, all pictures embedded, and no script except for an atlas.

`Report` holds the contents, and `write_report` writes the page. All text is plain text: it is escaped, and a blank line
in a section's text starts a new paragraph. This module is independent of PeCo.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from pecobook.errors import PecobookError
from pecobook.utils.files import write_atomically

MAX_BYTES = 10_000_000
"""Maximum size of a report. Mail servers refuse larger files, and phones load them slowly, so pictures are reduced."""

_FORMATS = {b"\x89PNG": "png", b"\xff\xd8\xff\xe0": "jpeg"}
"""Formats of pictures, by their first four bytes."""


@dataclass(frozen=True)
class Picture:
    """A PNG or JPEG with the texts that describe it."""

    encoded: bytes = field(repr=False)
    caption: str
    alt: str
    """A description of the picture for readers who do not see it."""
    title: str = ""
    """A short title above the picture, if pictures are shown side by side."""
    pixels: int | None = None
    """Width in CSS pixels; by default half of the picture's width, because figures have a high resolution."""
    tiles: Mapping[str, Any] | None = field(default=None, repr=False)
    """What `atlas.js` shows of the tiles that make up the picture, as returned by `atlas.as_json`."""

    @property
    def format(self) -> str:
        """The format, `png` or `jpeg`."""
        if self.encoded[:4] not in _FORMATS:
            raise PecobookError(f"The picture {self.caption[:60]!r} is not a PNG or JPEG.")
        return _FORMATS[self.encoded[:4]]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the header of the file."""
        with Image.open(io.BytesIO(self.encoded), formats=[self.format]) as image:
            return image.size

    @property
    def display_width(self) -> int:
        """Width in CSS pixels if the screen is wide enough."""
        return self.pixels or max(self.size[0] // 2, 1)

    @property
    def source(self) -> str:
        """The picture as a `data:` URL."""
        return f"data:image/{self.format};base64," + base64.b64encode(self.encoded).decode("ascii")


@dataclass(frozen=True)
class Table:
    """Rows of text; a row in which only the first cell has text is a heading of the rows below it."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text_columns: tuple[int, ...] = (0,)
    """Columns that hold words, aligned to the left; the other columns are aligned as numbers."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"a row has {len(row)} cells and the header {len(self.header)}: {row}")


def as_text(table: Table) -> str:
    """Return a table for the terminal."""
    rows = [table.header, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.header))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def as_markdown(table: Table) -> str:
    """Return a table in Markdown."""
    columns = range(len(table.header))
    rule = ["---" if column in table.text_columns else "---:" for column in columns]
    rows = [[cell.replace("|", r"\|") for cell in row] for row in (table.header, *table.rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (rows[0], rule, *rows[1:]))


@dataclass(frozen=True)
class Section:
    """A section of the page: text, then pictures, then a table, then collapsed details."""

    title: str
    text: str = ""
    pictures: tuple[Picture, ...] = ()
    table: Table | None = None
    details: str = ""
    """Preformatted text in a fixed-width font, collapsed; for example settings as JSON."""
    details_title: str = "Details"
    side_by_side: bool = False
    """Whether pictures are shown side by side if the screen is wide enough."""

    @property
    def paragraphs(self) -> tuple[str, ...]:
        """The text, split at blank lines."""
        return tuple(part.strip() for part in self.text.split("\n\n") if part.strip())


@dataclass(frozen=True)
class Report:
    """The contents of a report."""

    title: str
    subtitle: str = ""
    summary: tuple[str, ...] = ()
    """The main results in a few sentences; the first sentence is shown larger."""
    facts: tuple[tuple[str, str], ...] = ()
    """(label, value), shown in a row below the summary."""
    sections: tuple[Section, ...] = ()
    footer: str = ""
    lead: tuple[Picture, ...] = ()
    """The pictures that show the main result, below the first sentence of the summary."""


def write_report(out: Path, content: Report, *, max_bytes: int = MAX_BYTES) -> Path:
    """Write `report.html` atomically into the folder `out`, which is created if needed, and return the file's path.

    The largest pictures are halved until the file is smaller than `max_bytes`.
    """
    out.mkdir(parents=True, exist_ok=True)
    target = out / "report.html"
    write_atomically(target, render(fit(content, max_bytes)).encode())
    return target


def write_pictures(out: Path, pictures: Mapping[str, bytes]) -> None:
    """Write PNGs by file name atomically into the folder `pictures` of `out`, which is created if needed."""
    (out / "pictures").mkdir(exist_ok=True)
    for name, png in pictures.items():
        write_atomically(out / "pictures" / name, png)


def render(content: Report) -> str:
    """Render the page as HTML. Every value is escaped; a name that the template does not define raises an error.

    The page allows one script by its hash, and only if a picture has tiles.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("pecobook.analysis", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["typeset"] = _typeset
    script = ""
    if any(picture.tiles for section in content.sections for picture in section.pictures):
        script = (files("pecobook.analysis") / "templates" / "atlas.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return environment.get_template("report.html.j2").render(
        report=content, script=Markup(script), digest=digest if script else ""
    )


def _typeset(text: str) -> str:
    """Keep numbers together with their errors and units, and use typographic apostrophes."""
    text = re.sub(r"(?<=\d) (±) (?=\d)", "\u00a0\\1\u00a0", text)
    text = re.sub(r"(?<=\d) (?=(?:points|s|min|h|dB)\b)", "\u00a0", text)
    return re.sub(r"(?<=\w)'(?=\w)", "\u2019", text)


def fit(content: Report, max_bytes: int) -> Report:
    """Halve the largest pictures of `content`, as often as needed, until the page is smaller than `max_bytes`.

    A quarter of `max_bytes` is reserved for everything except pictures.
    """
    budget = 3 * max_bytes // 4
    while True:
        pictures = [*content.lead, *(picture for section in content.sections for picture in section.pictures)]
        if sum(len(picture.source) for picture in pictures) <= budget:
            return content
        largest = max(pictures, key=lambda picture: len(picture.encoded))
        if min(largest.size) < 64:
            raise PecobookError(
                f"The report has {len(pictures)} pictures, too many for {max_bytes} bytes; omit some pictures."
            )
        smaller = replace(largest, encoded=_halved(largest), pixels=largest.display_width)
        lead, *shown = (
            tuple(smaller if picture is largest else picture for picture in part)
            for part in (content.lead, *(section.pictures for section in content.sections))
        )
        pairs = zip(content.sections, shown, strict=True)
        sections = tuple(replace(section, pictures=part) for section, part in pairs)
        content = replace(content, lead=lead, sections=sections)


def _halved(picture: Picture) -> bytes:
    with Image.open(io.BytesIO(picture.encoded)) as image:
        size = (max(image.width // 2, 1), max(image.height // 2, 1))
        small = image.convert("RGB" if picture.format == "jpeg" else "RGBA").resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format=picture.format, optimize=True)
    return buffer.getvalue()
