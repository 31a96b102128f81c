"""A report as one HTML file that needs nothing else: no network, no script, all pictures inside.

`Report` is what it says, `write_report` how it looks. All text is plain: it is escaped, and a blank line in a
section's text starts a new paragraph. Nothing here knows what PeCo is.
"""

from __future__ import annotations

import base64
import io
import os
import re
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path

from pecobook.errors import PecobookError

MAX_BYTES = 10_000_000
"""A report above this is refused by mail servers and slow on a phone, so pictures are made smaller to fit."""

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Picture:
    """A PNG with what it shows."""

    png: bytes = field(repr=False)
    caption: str
    alt: str
    """What it shows, for those who do not see it."""
    title: str = ""
    """A short name above it, where several stand side by side."""
    pixels: int | None = None
    """CSS pixels across at which it is shown; half its own by default, since figures are drawn dense."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the PNG's header."""
        if self.png[:8] != _PNG or len(self.png) < 24:
            raise PecobookError(f"The picture {self.caption[:60]!r} is not a PNG.")
        width, height = struct.unpack(">II", self.png[16:24])
        return int(width), int(height)

    @property
    def shown(self) -> int:
        """CSS pixels across at which it is shown where there is room."""
        return self.pixels or max(self.size[0] // 2, 1)

    @property
    def source(self) -> str:
        """The picture as a `data:` address."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Table:
    """Rows of ready-made text; a row with nothing but its first cell is a heading for those below it."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text_columns: tuple[int, ...] = (0,)
    """Columns that hold words, aligned to the left; all others are aligned as numbers."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"a row has {len(row)} cells and the header {len(self.header)}: {row}")


@dataclass(frozen=True)
class Section:
    """A part of the page: text, then pictures, then a table, then collapsed details."""

    title: str
    text: str = ""
    pictures: tuple[Picture, ...] = ()
    table: Table | None = None
    details: str = ""
    """Set as it is, in a fixed-width face, collapsed; for example settings as JSON."""
    details_title: str = "Details"
    side_by_side: bool = False
    """Pictures stand beside each other where the screen is wide enough."""

    @property
    def paragraphs(self) -> tuple[str, ...]:
        """The text, split at blank lines."""
        return tuple(part.strip() for part in self.text.split("\n\n") if part.strip())


@dataclass(frozen=True)
class Report:
    """All that a report says."""

    title: str
    subtitle: str = ""
    summary: tuple[str, ...] = ()
    """Sentences a reader in a hurry takes away; the first is set larger."""
    facts: tuple[tuple[str, str], ...] = ()
    """(label, value), shown as a strip below the summary."""
    sections: tuple[Section, ...] = ()
    footer: str = ""


def write_report(out: Path, content: Report, *, max_bytes: int = MAX_BYTES) -> Path:
    """Write `report.html` into the folder `out` (made where missing) and return its path.

    The file appears at once or not at all. Above `max_bytes` its largest pictures are halved until it fits.
    """
    out.mkdir(parents=True, exist_ok=True)
    target = out / "report.html"
    html = render(fit(content, max_bytes))
    partial = out / f".report.html.{os.getpid()}.partial"
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(html)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def render(content: Report) -> str:
    """The page as text. Every value is escaped; a name the template does not know is an error."""
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
    """Prose as a printer sets it: figures stay with their error and unit, apostrophes are curved."""
    text = re.sub(r"(?<=\d) (±) (?=\d)", "\u00a0\\1\u00a0", text)
    text = re.sub(r"(?<=\d) (?=(?:points|s|min|h|dB)\b)", "\u00a0", text)
    return re.sub(r"(?<=\w)'(?=\w)", "\u2019", text)


def fit(content: Report, max_bytes: int) -> Report:
    """`content` with its largest pictures halved, as often as needed, so that the page stays below
    `max_bytes`.

    A quarter of `max_bytes` is left for everything that is not a picture.
    """
    budget = 3 * max_bytes // 4
    while True:
        pictures = [picture for section in content.sections for picture in section.pictures]
        if sum(len(picture.source) for picture in pictures) <= budget:
            return content
        largest = max(pictures, key=lambda picture: len(picture.png))
        if min(largest.size) < 64:
            raise PecobookError(
                f"The report has {len(pictures)} pictures, too many for {max_bytes} bytes; leave some out."
            )
        smaller = replace(largest, png=_halved(largest.png), pixels=largest.shown)
        sections = tuple(
            replace(section, pictures=tuple(smaller if p is largest else p for p in section.pictures))
            for section in content.sections
        )
        content = replace(content, sections=sections)


def _halved(png: bytes) -> bytes:
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        size = (max(image.width // 2, 1), max(image.height // 2, 1))
        small = image.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
