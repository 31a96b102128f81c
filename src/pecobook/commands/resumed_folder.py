"""The folder of a command that trains many runs and can be resumed in it: `demo` and `reproduce`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pecobook.data import record
from pecobook.data.source import Splits
from pecobook.engine.data_check import compare_data
from pecobook.errors import RunFolderError
from pecobook.settings.changes import changed_settings, complete
from pecobook.settings.images import ManyRunsConfig
from pecobook.utils.files import write_json
from pecobook.utils.folder_lock import FolderLock
from pecobook.utils.json_files import read_json
from pecobook.utils.output_folder import OutputFolder
from pecobook.utils.printer import show


def resumed_folder(
    out: str,
    settings: dict[str, Any],
    defaults: dict[str, Any],
    join: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = lambda settings, _: settings,
    **rules: Any,
) -> OutputFolder:
    """Return the rules for the folder of a command that resumes its jobs if the folder has the same settings.

    Args:
        out: the folder.
        settings: settings that must not change when the command resumes; the marker holds them.
        defaults: default values of these settings.
        join: returns the first settings with what they may leave out and the second ones have: it only adds jobs.
        rules: `example`, `kind`, `marker`, `schema` and `data` of `OutputFolder`.
    """

    def joined(old: dict[str, Any]) -> dict[str, Any]:
        old = complete(old, defaults)
        together = join(settings, old)
        changed = changed_settings(join(old, settings), together)
        if changed:
            raise RunFolderError(
                f"--out '{out}' was begun with other settings: {'; '.join(changed)}. Name another folder."
            )
        return together

    return OutputFolder(out, **rules, always_resumes=True, check_resume=joined)


def begin_or_resume(
    folder: OutputFolder, config: ManyRunsConfig, splits: Splits, settings: dict[str, Any]
) -> FolderLock:
    """Create the folder, or continue it if its data are unchanged; return its lock.

    Args:
        folder: the result of `resumed_folder`.
        config: the settings of the command.
        splits: the images of --data.
        settings: the content of the marker in a new folder.

    Raises:
        RunFolderError: the folder cannot be used, or the data have changed and the change is not accepted.
    """
    now = record.take(splits, verify=config.verify_data)  # before the folder is locked, since it may take long

    def write(out: Path) -> None:
        new: record.Record | None = now
        content, marker = settings, out / folder.marker
        if marker.exists():
            assert folder.check_resume is not None
            content = folder.check_resume(read_json(marker, folder.schema)) or settings
            accept, of = config.accept_data_change, f"the {folder.kind.removeprefix('a ')}"
            notes, new = compare_data(out, now, data=config.data, of=of, accept=accept)
            for note in notes:
                show(note)
        write_json(marker, content)
        if new is not None:
            new.write(out)

    return folder.begin(write)
