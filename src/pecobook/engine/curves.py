"""The picture curves.png of a run folder, updated while the run trains."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from pecobook.engine.log import Sink
from pecobook.errors import first_line
from pecobook.utils.files import write_atomically
from pecobook.utils.json_files import evaluation_of
from pecobook.utils.printer import say

Draw: TypeAlias = Callable[[Path], bytes]
"""Draws the picture of a metrics.jsonl as PNG; the result is empty while there is nothing to draw."""

_RATIO = 100
"""Shortest time between two drawings, as a multiple of the time that the last one took."""
_FIRST_COST = 3.0
"""Seconds that the first drawing may take, which also imports the library."""


class Curves(Sink):
    """Draw curves.png after evaluations and with checkpoints, using at most a hundredth of the time, and at the end.

    The picture is drawn from metrics.jsonl, so that it includes the steps before a resume. An error does not affect the
    run and is reported once.
    """

    def __init__(self, folder: Path, draw: Draw) -> None:
        self._folder, self._draw = folder, draw
        self._drawn_at, self._cost = time.monotonic(), _FIRST_COST
        self._outdated = not (folder / "curves.png").exists()
        self._failed = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:  # noqa: ARG002
        """Redraw the picture after an evaluation; this logger comes after that of metrics.jsonl."""
        self._outdated = True
        if evaluation_of(metrics):
            self.flush()

    def flush(self) -> None:
        """Redraw the picture if the last drawing was long enough ago."""
        if time.monotonic() - self._drawn_at >= _RATIO * self._cost:
            self.close()

    def close(self) -> None:
        """Draw the picture if it lacks a step."""
        if not self._outdated or self._failed:
            return
        began = time.monotonic()
        try:
            png = self._draw(self._folder / "metrics.jsonl")
            if png:
                write_atomically(self._folder / "curves.png", png)
        except Exception as error:  # no error here may end the run, which may take days
            self._failed = True
            say(f"curves.png was not drawn: {first_line(error)}. The run is not affected.")
        self._outdated = False
        self._drawn_at = time.monotonic()
        self._cost = self._drawn_at - began
