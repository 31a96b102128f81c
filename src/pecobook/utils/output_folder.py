"""The folder of `--out`, for every command that writes one: checked, locked, and emptied or resumed."""

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
    """An output folder and the rules for using it; with the defaults the folder must be new or empty."""

    out: str
    """Path of the folder, as the user wrote it."""
    example: str = "runs/first"
    """An example of a path, for the error message where `out` is empty."""
    kind: str = ""
    """Name of the content, with an article: "a token bank"."""
    marker: str = ""
    """JSON file that identifies a folder of this kind; a folder without the file cannot be resumed."""
    is_own: Callable[[Path], bool] | None = None
    """Returns whether a folder is of this kind, so that it may be deleted; None checks for the marker."""
    resume: bool | None = None
    """Whether `--resume` was given; None where the command has no such flag."""
    overwrite: bool | None = None
    """Whether `--overwrite` was given; None where the command has no such flag."""
    always_resumes: bool = False
    """Whether the command resumes a folder of this kind without a flag."""
    check_resume: Callable[[dict[str, Any]], None] | None = None
    """Takes the content of the marker, and raises RunFolderError where the folder cannot be resumed."""

    @property
    def path(self) -> Path:
        """The folder as a path."""
        return Path(self.out)

    def check(self) -> None:
        """Raise RunFolderError when the folder cannot be used under these rules. Changes nothing."""
        out, noun = self.path, re.sub(r"^an? ", "", self.kind)
        if not self.out:
            raise RunFolderError(f"--out is missing: name the folder to write, for example --out {self.example}.")
        if out.exists() and not out.is_dir():
            raise RunFolderError(f"--out '{out}' is a file: name a folder.")
        filled = bool(content(out))
        marked = bool(self.marker) and (out / self.marker).is_file()
        resumes = bool(self.resume) or (self.always_resumes and marked)
        if filled and not (resumes or self.overwrite):
            raise RunFolderError(f"--out '{out}' is not empty{self._remedies(noun)}.")
        if self.resume and not marked:
            raise RunFolderError(f"--resume: there is no {noun} in '{out}'. Leave --resume out to start one.")
        if resumes and self.check_resume is not None:
            self.check_resume(self._read_marker())
        if self.overwrite and filled and not (marked if self.is_own is None else self.is_own(out)):
            raise RunFolderError(
                f"--overwrite: '{out}' does not look like {self.kind}, so it is not deleted: name another folder."
            )
        parent = next(parent for parent in [out, *out.absolute().parents] if parent.exists())
        if not parent.is_dir():
            raise RunFolderError(f"--out '{out}' cannot be created: '{parent}' is a file.")
        if not os.access(parent, os.W_OK):
            raise RunFolderError(f"--out '{out}' cannot be written: no permission in '{parent}'.")

    def _read_marker(self) -> dict[str, Any]:
        file = self.path / self.marker
        try:
            return dict(json.loads(file.read_text()))
        except (OSError, TypeError, ValueError) as error:
            flag = "--resume" if self.resume else "--out"
            raise RunFolderError(f"{flag}: '{file}' cannot be read ({error}).") from None

    def _remedies(self, noun: str) -> str:
        content = f" and holds no {noun}" if self.always_resumes else ""
        flags = ["continue with --resume"] if self.resume is not None else []
        flags += ["delete it with --overwrite"] if self.overwrite is not None else []
        return f"{content}: {', '.join([*flags, 'or name another folder' if flags else 'name another folder'])}"

    def begin(self, write: Callable[[Path], None] | None = None) -> FolderLock:
        """Create the folder, lock it, empty it under `overwrite`, and call `write` to write its first files.

        Returns:
            the lock: call `release`, or use the lock as a context, when everything is written.

        Raises:
            RunFolderError: another process holds the folder, or it cannot be written; the lock is then released.
        """
        out, lock = self.path, None
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(out)
            self.check()  # again: another command may have changed the folder since
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
    """Raise RunFolderError when the file of `--out` exists already or has no folder; an empty `out` names no file."""
    if out and Path(out).exists():
        raise RunFolderError(f"--out '{out}' exists already: name another file.")
    if out and not Path(out).parent.is_dir():
        raise RunFolderError(f"--out '{out}' cannot be written: make the folder '{Path(out).parent}' first.")
