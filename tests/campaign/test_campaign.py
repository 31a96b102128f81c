"""A handful of the campaign's cases; `make campaign` runs all of them, for as long as it is told to."""

from __future__ import annotations

import sys
from pathlib import Path

from tests import forked
from tests.campaign.__main__ import main


def campaign(_words: list[str]) -> None:
    sys.exit(main())


def test_campaign__a_handful_of_cases_ends_as_promised(tmp_path: Path) -> None:
    log = tmp_path / "log"
    forked.run(["--short", "--out", str(tmp_path / "campaign")], log, program=campaign)
    assert "killed before a file event" in log.read_text()
