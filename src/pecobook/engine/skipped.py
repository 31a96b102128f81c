"""The unreadable images of a run: train.log names each once, and the last line says how many there were."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pecobook.utils.distributed import gather_objects


class Skipped:
    """The images that this rank could not read.

    Args:
        log: writes a line to train.log; None on all ranks but the first.
    """

    def __init__(self, log: Callable[[str], None] | None) -> None:
        self._log, self._names = log, dict[str, None]()

    def __len__(self) -> int:
        return len(self._names)

    def note(self, names: Iterable[str]) -> None:
        """Add images, and log those that are new."""
        for name in names:
            if name not in self._names:
                self._names[name] = None
                if self._log is not None:
                    self._log(f"skipped: {name}")

    def share(self) -> None:
        """Tell all ranks what the others could not read; the first one has the log. All ranks call this."""
        for names in gather_objects(list(self._names)):
            self.note(names)
