"""What the guides tell people to type is understood, and what they link to exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pecobook import cli
from pecobook.config import flags
from pecobook.recipes import recipe

DOCS = Path(__file__).parent.parent / "docs"


def flags_in(text: str) -> list[str]:
    """Pieces of code that begin with a flag of `pecobook codebook`."""
    pieces = re.findall(r"`(--[^`]+)`", text)
    return [
        piece for piece in pieces if piece.startswith(("--perceptual", "--quantizer", "--model", "--adv", "--expl"))
    ]


def test_codebook__every_flag_is_understood() -> None:
    pieces = flags_in((DOCS / "codebook.md").read_text())
    assert len(pieces) > 20
    for piece in pieces:
        name, *values = shlex.split(piece)
        if values:  # a flag alone is only spoken of
            cli.parse(recipe("codebook", "paper"), [name, *values], "codebook paper")
        else:
            assert name.removeprefix("--") in flags(type(recipe("codebook", "paper"))), name


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_exist(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link
