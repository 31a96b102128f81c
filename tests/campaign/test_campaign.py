"""A handful of the campaign's cases; `make campaign` runs all of them, for as long as it is told to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_campaign__a_handful_of_cases_ends_as_promised(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.campaign", "--short", "--out", str(tmp_path / "campaign")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed before a file event" in done.stdout
