"""Reports as one self-contained HTML file: no network, no script, all pictures embedded.

`Report` holds the contents, and `write_report` writes the page. All text is plain text: it is escaped, and a blank line
in a section's text starts a new paragraph. This module is independent of PeCo.
"""

from __future__ import annotations

import base64
import io
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from pecobook.errors import PecobookError
from pecobook.utils.files import write_atomically

MAX_BYTES = 10_000_000
"""Maximum size of a report. Mail servers refuse larger files, and phones load them slowly, so pictures are reduced."""

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A PNG with the texts that describe it."""

    png: bytes = field(repr=False)
    caption: str
    alt: str
    """A description of the picture for readers who do not see it."""
    title: str = ""
    """A short title above the picture, if pictures are shown side by side."""
    pixels: int | None = None
    """Width in CSS pixels; by default half of the PNG's width, because figures have a high resolution."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the header of the PNG."""
        if self.png[:8] != _PNG or len(self.png) < 24:
            raise PecobookError(f"The picture {self.caption[:60]!r} is not a PNG.")
        width, height = struct.unpack(">II", self.png[16:24])
        return int(width), int(height)

    @property
    def display_width(self) -> int:
        """Width in CSS pixels if the screen is wide enough."""
        return self.pixels or max(self.size[0] // 2, 1)

    @property
    def source(self) -> str:
        """The picture as a `data:` URL."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


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
    """Render the page as HTML. Every value is escaped; a name that the template does not define raises an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("pecobook.analysis", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["typeset"] = _typeset
    return environment.get_template("report.html.j2").render(report=content)


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
        pictures = [picture for section in content.sections for picture in section.pictures]
        if sum(len(picture.source) for picture in pictures) <= budget:
            return content
        largest = max(pictures, key=lambda picture: len(picture.png))
        if min(largest.size) < 64:
            raise PecobookError(
                f"The report has {len(pictures)} pictures, too many for {max_bytes} bytes; omit some pictures."
            )
        smaller = replace(largest, png=_halved(largest.png), pixels=largest.display_width)
        sections = tuple(
            replace(section, pictures=tuple(smaller if p is largest else p for p in section.pictures))
            for section in content.sections
        )
        content = replace(content, sections=sections)


def _halved(png: bytes) -> bytes:
    with Image.open(io.BytesIO(png)) as image:
        size = (max(image.width // 2, 1), max(image.height // 2, 1))
        small = image.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
