"""The folder of a command that trains many runs and can be resumed in it: `demo` and `reproduce`."""

from __future__ import annotations

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
from pecobook.utils.output_folder import OutputFolder
from pecobook.utils.printer import show


def resumed_folder(
    out: str, settings: dict[str, Any], defaults: dict[str, Any], *, optional: tuple[str, ...] = (), **rules: Any
) -> OutputFolder:
    """Return the rules for the folder of a command that resumes its jobs if the folder has the same settings.

    Args:
        out: the folder.
        settings: settings that must not change when the command resumes; the marker holds them.
        defaults: default values of these settings.
        optional: beginnings of names of settings that a command may leave out, since they only add jobs; a check of
            the folder then takes their earlier values into `settings`.
        rules: `example`, `kind`, `marker` and `data` of `OutputFolder`.
    """

    def check_unchanged(old: dict[str, Any]) -> None:
        old = complete(old, defaults)
        for group in ([name for name in settings if name.startswith(start)] for start in optional):
            if not any(settings[name] for name in group):
                settings.update({name: old[name] for name in group})
            elif not any(old[name] for name in group):
                old.update({name: settings[name] for name in group})
        changed = changed_settings(old, settings)
        if changed:
            raise RunFolderError(
                f"--out '{out}' was begun with other settings: {'; '.join(changed)}. Name another folder."
            )

    return OutputFolder(out, **rules, always_resumes=True, check_resume=check_unchanged)


def begin_or_resume(
    folder: OutputFolder, config: ManyRunsConfig, splits: Splits, settings: dict[str, Any]
) -> FolderLock:
    """Create the folder, or continue it if its data are unchanged; return its lock.

    Args:
        folder: the result of `resumed_folder`.
        config: the settings of the command.
        splits: the images of --data.
        settings: the content of the marker.

    Raises:
        RunFolderError: the folder cannot be used, or the data have changed and the change is not accepted.
    """
    now = record.take(splits, verify=config.verify_data)  # before the folder is locked, since it may take long

    def write(out: Path) -> None:
        new: record.Record | None = now
        if (out / folder.marker).exists():
            accept, of = config.accept_data_change, f"the {folder.kind.removeprefix('a ')}"
            notes, new = compare_data(out, now, data=config.data, of=of, accept=accept)
            for note in notes:
                show(note)
        write_json(out / folder.marker, settings)
        if new is not None:
            new.write(out)

    return folder.begin(write)
