"""The folder that `--out` names, whatever a command writes there: refused, emptied, gone on with, and locked."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pecobook.errors import RunFolderError
from pecobook.utils.folder_lock import FolderLock, content


@dataclasses.dataclass(frozen=True)
class OutputFolder:
    """What a command may do with the folder that its user named; with the defaults it must be new or empty."""

    out: str
    """As the user wrote it."""
    example: str = "runs/first"
    """For who names none."""
    kind: str = ""
    """What the command writes, with its article: "a token bank"."""
    mark: str = ""
    """The file by which such a folder is known, and without which it cannot be gone on with."""
    is_own: Callable[[Path], bool] | None = None
    """Whether a folder is such a one, so that it may be deleted; None asks for the mark."""
    resume: bool | None = None
    """Whether `--resume` was given; None where the command has no such flag."""
    overwrite: bool | None = None
    """Whether `--overwrite` was given; None where the command has no such flag."""
    goes_on: bool = False
    """Whether a folder of the command's own is gone on with unasked."""
    may_go_on: Callable[[dict[str, Any]], None] | None = None
    """Raises RunFolderError where a folder cannot be gone on with, by the JSON object that its mark holds."""

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.out)

    def check(self) -> None:
        """Raise RunFolderError when the folder cannot be used as asked. Changes nothing."""
        out, noun = self.path, re.sub(r"^an? ", "", self.kind)
        if not self.out:
            raise RunFolderError(f"--out is missing: name the folder to write, for example --out {self.example}.")
        if out.exists() and not out.is_dir():
            raise RunFolderError(f"--out '{out}' is a file: name a folder.")
        filled = bool(content(out))
        marked = bool(self.mark) and (out / self.mark).is_file()
        going_on = bool(self.resume) or (self.goes_on and marked)
        if filled and not (going_on or self.overwrite):
            raise RunFolderError(f"--out '{out}' is not empty{self._what_to_do(noun)}.")
        if self.resume and not marked:
            raise RunFolderError(f"--resume: there is no {noun} in '{out}'. Leave --resume out to start one.")
        if going_on and self.may_go_on is not None:
            self.may_go_on(self._begun_with())
        if self.overwrite and filled and not (marked if self.is_own is None else self.is_own(out)):
            raise RunFolderError(f"--overwrite: '{out}' does not look like {self.kind}, so it is not deleted.")
        parent = next(parent for parent in [out, *out.absolute().parents] if parent.exists())
        if not parent.is_dir():
            raise RunFolderError(f"--out '{out}' cannot be made: '{parent}' is a file.")
        if not os.access(parent, os.W_OK):
            raise RunFolderError(f"--out '{out}' cannot be written: no permission in '{parent}'.")

    def _begun_with(self) -> dict[str, Any]:
        file = self.path / self.mark
        try:
            return dict(json.loads(file.read_text()))
        except (OSError, TypeError, ValueError) as error:
            flag = "--resume" if self.resume else "--out"
            raise RunFolderError(f"{flag}: '{file}' cannot be read ({error}).") from None

    def _what_to_do(self, noun: str) -> str:
        holds = f" and holds no {noun}" if self.goes_on else ""
        ways = ["go on with --resume"] if self.resume is not None else []
        ways += ["delete it with --overwrite"] if self.overwrite is not None else []
        return f"{holds}: {', '.join([*ways, 'or name another folder' if ways else 'name another folder'])}"

    def begin(self, write: Callable[[Path], None] | None = None) -> FolderLock:
        """Make the folder, lock it, empty it where that was asked for, and write what comes first.

        Returns:
            the lock, to release or to leave at the end of what is written.

        Raises:
            RunFolderError: another process has it, or it cannot be written; then it is free again.
        """
        out, lock = self.path, None
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(out)
            self.check()  # again: another command may have begun or ended here since
            for path in content(out) if self.overwrite else ():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            if write is not None:
                write(out)
        except BaseException as error:
            if lock is not None:
                lock.release()
            if isinstance(error, OSError):
                raise RunFolderError(f"--out '{out}' cannot be written: {error}") from None
            raise
        return lock


def check_new_file(out: str) -> None:
    """Raise RunFolderError when the file that `--out` names, if it names one, is there already."""
    if out and Path(out).exists():
        raise RunFolderError(f"--out '{out}' exists already: name another file.")
