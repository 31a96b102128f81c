"""The folder of `--out`, for every command that writes one: checked, locked, and emptied or resumed."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pecobook.errors import RunFolderError, some_of
from pecobook.utils.folder_lock import FolderLock, content
from pecobook.utils.json_files import Schema, read_if_valid, read_json
from pecobook.utils.printer import say

SHARED_WAIT = 60.0
"""Seconds to wait for the lock of a folder that several processes write to at once."""


@dataclasses.dataclass(frozen=True)
class OutputFolder:
    """An output folder and the rules for using it; with the defaults the folder must be new or empty."""

    out: str
    """Path of the folder, as the user wrote it."""
    example: str = "runs/first"
    """An example path, for the error message if `out` is empty."""
    kind: str = ""
    """Name of the content, with an article: "a token bank"."""
    marker: str = ""
    """JSON file that identifies a folder of this kind, the first file that the command writes; a folder without it can
    be neither resumed nor overwritten."""
    schema: Schema = dataclasses.field(default_factory=dict)
    """The marker's content in a folder of this kind; other folders may have a file with its name."""
    files: tuple[str, ...] = ()
    """Patterns of the files that the command writes, relative to the folder; `--overwrite` deletes only these."""
    data: str = ""
    """The image source that the command reads; the folder must lie apart from it."""
    reads: tuple[str, ...] = ()
    """Other files and folders that the command reads; `--overwrite` refuses a folder that contains one."""
    resume: bool | None = None
    """Whether `--resume` was given; None if the command has no such flag."""
    overwrite: bool | None = None
    """Whether `--overwrite` was given; None if the command has no such flag."""
    always_resumes: bool = False
    """Whether the command resumes a folder of this kind without a flag, or `--resume auto` was given."""
    shared: bool = False
    """Whether other processes may write parts of the folder, each with its own lock; the lock of the folder is then
    held only briefly, and waited for."""
    check_resume: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None
    """Takes the content of the marker, and raises RunFolderError if the folder cannot be resumed. It may return the
    marker's next content."""

    @property
    def path(self) -> Path:
        """The folder as a path."""
        return Path(self.out)

    def check(self) -> None:
        """Raise RunFolderError if the folder cannot be used under these rules. Changes nothing."""
        out, noun = self.path, re.sub(r"^an? ", "", self.kind)
        if not self.out:
            raise RunFolderError(f"--out is missing: name the folder to write, for example --out {self.example}.")
        _check_length(out)
        if self.out.startswith("~") and not out.exists():
            raise RunFolderError(f"--out '{out}': the shell did not replace '{out.parts[0]}': give the path in full.")
        if out.exists() and not out.is_dir():
            raise RunFolderError(f"--out '{out}' is a file: name a folder.")
        if out.is_symlink() and not out.exists():
            raise RunFolderError(
                f"--out '{out}' is a link to '{out.readlink()}', which is not there: make that folder."
            )
        self._check_apart_from_data()
        marked = bool(self.marker) and (out / self.marker).is_file()
        # A command that was killed while it wrote the marker leaves only the marker's temporary file.
        names = {path.name for path in content(out)}
        killed_at_start = bool(names) and names == {f".{self.marker}.tmp"}
        filled = bool(names) and not killed_at_start
        resumes = bool(self.resume) or (self.always_resumes and marked)
        if filled and not (resumes or self.overwrite):
            raise RunFolderError(f"--out '{out}' is not empty{self._remedies(noun)}.")
        if self.resume and not marked and not killed_at_start:
            raise RunFolderError(f"--resume: there is no {noun} in '{out}'. Leave --resume out to start one.")
        if resumes and marked and self.check_resume is not None:
            self.check_resume(read_json(out / self.marker, self.schema, remedy="Restore it, or name another --out."))
        if self.overwrite and filled and read_if_valid(out / self.marker, self.schema) is None:
            raise RunFolderError(
                f"--overwrite: '{out}' does not look like {self.kind}, so it is not deleted: name another folder."
            )
        if self.overwrite:
            self._refuse_to_delete_inputs()
        parent = next(parent for parent in [out, *out.absolute().parents] if parent.exists())
        if not parent.is_dir():
            raise RunFolderError(f"--out '{out}' cannot be created: '{parent}' is a file.")
        _check_permission(out, parent)

    def _check_apart_from_data(self) -> None:
        """Raise RunFolderError if the folder is, contains or lies inside the folder of images."""
        data = Path(self.data).expanduser()
        if not self.data or self.data.startswith("hf:") or not ("/" in self.data or data.exists()):
            return
        out, data = self.path.expanduser().resolve(), data.resolve()
        if not data.is_dir():  # a file, or a pattern of several
            if out in data.parents and out.is_dir():
                raise RunFolderError(
                    f"--out '{self.out}' holds the images '{self.data}': name another folder, so that images and "
                    "results never mix."
                )
            return
        for inner, outer, relation in ((out, data, "lies inside"), (data, out, "contains")):
            if inner == outer or inner.is_relative_to(outer):
                relation = "is" if out == data else relation
                raise RunFolderError(
                    f"--out '{self.out}' {relation} the folder of images '{self.data}': name a folder outside of it, "
                    "so that images and results never mix."
                )

    def _written_files(self) -> set[Path]:
        patterns = (*self.files, f".{self.marker}.tmp")
        return {path for pattern in patterns for path in self.path.glob(pattern) if not path.is_dir()}

    def _refuse_to_delete_inputs(self) -> None:
        """Raise RunFolderError if `overwrite` would delete what the command reads, or files behind a link."""
        out = self.path.resolve()
        for text in self.reads:
            path = Path(text).expanduser()
            if text and path.exists() and out in (path.resolve(), *path.resolve().parents):
                raise RunFolderError(f"--overwrite: '{text}', which is read, lies in '{self.out}': name another --out.")
        folders = {parent for file in self._written_files() for parent in file.parents if self.path in parent.parents}
        for link in sorted(folder for folder in folders if folder.is_symlink()):
            raise RunFolderError(
                f"--overwrite: '{link}' is a link to '{link.resolve()}', in which nothing is deleted: empty that "
                "folder, or remove the link."
            )

    def _delete_files(self) -> None:
        """Delete the files that the command writes, and folders that become empty; name what remains."""
        files = self._written_files()
        for file in sorted(files, key=lambda path: path.name == self.marker):  # last: until then the folder is ours
            file.unlink()
        folders = {parent for file in files for parent in file.parents if self.path in parent.parents}
        for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()
        rest = [path.name for path in content(self.path) if path.is_file() or any(path.iterdir())]
        if rest:
            say(f"--overwrite leaves what pecobook did not write in '{self.out}': {some_of(sorted(rest), 5)}")

    def _remedies(self, noun: str) -> str:
        content = f" and holds no {noun}" if self.always_resumes else ""
        flags = ["continue with --resume"] if self.resume is not None and not self.always_resumes else []
        flags += ["delete it with --overwrite"] if self.overwrite is not None else []
        return f"{content}: {', '.join([*flags, 'or name another folder' if flags else 'name another folder'])}"

    def begin(self, write: Callable[[Path], None] | None = None) -> FolderLock:
        """Create the folder, lock it, empty it under `overwrite`, and call `write` to write its first files.

        Returns:
            the lock: call `release`, or use the lock as a context manager, once everything is written.

        Raises:
            RunFolderError: another process holds the folder, or it cannot be written; the lock is then released.
        """
        out, lock = self.path, None
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = FolderLock(out, shared=self.shared, wait=SHARED_WAIT if self.shared else 0.0)
            self.check()  # again: another command may have changed the folder since
            if self.overwrite:
                self._delete_files()
            if write is not None:
                write(out)
        except BaseException as error:
            if lock is not None:
                lock.release()
            if isinstance(error, OSError):
                raise RunFolderError(f"--out '{out}' cannot be written: {error}") from None
            raise
        return lock


def _check_length(path: Path, flag: str = "out") -> None:
    """Raise RunFolderError if a file system cannot hold the name."""
    name = max(path.parts, key=len, default="")
    if len(os.fsencode(name)) > 255:
        raise RunFolderError(f"--{flag}: the name '{name}' is longer than 255 bytes: give a shorter name.")


def check_new_file(out: str, flag: str = "out") -> None:
    """Raise RunFolderError if a flag's file exists or cannot be written; an empty `out` names no file."""
    if not out:
        return
    file = Path(out)
    _check_length(file, flag)
    if file.exists():
        raise RunFolderError(f"--{flag} '{out}' exists already: name another file.")
    if not file.parent.is_dir():
        raise RunFolderError(f"--{flag} '{out}' cannot be written: make the folder '{file.parent}' first.")
    _check_permission(file, file.parent, flag)


def _check_permission(out: Path, folder: Path, flag: str = "out") -> None:
    if not os.access(folder, os.W_OK):
        raise RunFolderError(f"--{flag} '{out}' cannot be written: no permission in '{folder}'.")
