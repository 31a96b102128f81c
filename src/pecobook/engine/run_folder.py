"""The run folder: checks before a run writes into it, and the files written before the first step.

config.json  config.diff  environment.json  metrics.jsonl  curves.png  train.log  samples/  checkpoints/  export/
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pecobook.data import record
from pecobook.data.source import Splits
from pecobook.engine import longer
from pecobook.engine.data_check import check_bank, compare_data
from pecobook.errors import RunFolderError
from pecobook.settings.changes import changed_settings, complete
from pecobook.settings.images import AUTO, RangeSetting
from pecobook.settings.training import TrainConfig
from pecobook.settings.values import to_dict
from pecobook.utils.files import write_atomically, write_json
from pecobook.utils.folder_lock import FolderLock
from pecobook.utils.given import hooks
from pecobook.utils.json_files import ANY, OBJECT, TEXT, list_of, read_if_valid, read_json
from pecobook.utils.output_folder import OutputFolder
from pecobook.utils.printer import say

_ENVIRONMENT = {"versions": OBJECT, "earlier": list_of(OBJECT).or_none, "data_notes": list_of(TEXT).or_none}
_RUN = {"command": TEXT, "data": TEXT, "out": TEXT}  # many folders hold a config.json
_FILES = (
    *("config.json", "environment.json", "data.parquet", "metrics.jsonl", "train.log", "events.out.tfevents.*"),
    *("config.diff", "curves.png", ".*.tmp"),
    *("predictions.parquet", "classes.json", "detections.json", "average_precision.json"),
    *(f"samples/{name}" for name in ("step-*.png", "example.png", "confusion.png", "detections.png", ".*.tmp")),
    *("checkpoints/step-*/state.pt*", "checkpoints/.step-*.tmp/*"),
    *(f"export/{name}" for name in ("config.json*", "*.safetensors*", "README.md", ".*.tmp")),
)


def check(config: TrainConfig, command: str, num_images: int = 0) -> None:
    """Raise RunFolderError if `config.out` cannot be used as the settings require. Changes nothing.

    `num_images` is the number of training images, 0 if unknown; a new length of a run is then not checked.
    """
    _folder(config, command, num_images).check()


def prepare(
    config: TrainConfig, command: str, splits: Splits | None = None, recipe: str = "", changes: Sequence[str] = ()
) -> FolderLock:
    """Create and lock the folder, write config.json and environment.json, and return the lock.

    Args:
        config: the settings.
        command: name of the command.
        splits: the data, which are compared with those of the resumed run; None skips that.
        recipe: name of the recipe that the settings come from; empty if unknown.
        changes: lines of config.diff, on settings that differ from the recipe's.

    Raises:
        RunFolderError: the folder cannot be used, or the data have changed.
    """
    notes: list[str] = []
    now = None if splits is None else record.take(splits, verify=config.verify_data)
    bank: str = getattr(config, "tokens", "")
    if now is not None and bank:
        notes += check_bank(bank, now, data=config.data)
    images = {} if splits is None else _image_counts(splits)
    files = {"config.json": (json.dumps(stored_settings(config, command, recipe), indent=2) + "\n").encode()}
    if recipe:
        lines = [
            f"pecobook {command} {recipe}: {'settings that differ' if changes else 'no setting differs'}",
            *changes,
        ]
        files["config.diff"] = "".join(f"{line}\n" for line in lines).encode()
    folder = _folder(config, command, images.get("training", 0))
    return folder.begin(partial(_write_settings, config, files, now, notes, images))


def recorded_range(out: str) -> RangeSetting:
    """Return the value range that the run in the folder `out` used; `AUTO` if there is no such run."""
    settings = read_if_valid(Path(out) / "config.json", {"value_range": list_of(ANY).or_none})
    return AUTO if settings is None else tuple(settings.get("value_range") or AUTO)


def _folder(config: TrainConfig, command: str, num_images: int) -> OutputFolder:
    return OutputFolder(
        config.out,
        kind="a run",
        marker="config.json",
        schema=_RUN,
        files=_FILES,
        data=config.data,
        reads=tuple(_texts(to_dict(config), leave_out=("out", "data"))),
        resume=config.resume is True,
        always_resumes=config.resume == "auto",
        overwrite=config.overwrite,
        check_resume=partial(_check_resume, config, command, num_images),
    )


def _texts(settings: dict[str, Any], leave_out: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the settings that may name a file."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _texts(value)
        elif isinstance(value, str) and name not in leave_out and "\0" not in value:
            yield value


def _check_resume(config: TrainConfig, command: str, num_images: int, old: dict[str, Any]) -> None:
    out = Path(config.out)
    old.pop("recipe", "")
    before, now = (python.get("transform", "none") for python in (old.pop("python", {}), hooks()))
    if before != now:
        raise RunFolderError(
            f"--resume: the run in '{out}' took the transform {before} from Python, and now it is {now}: "
            f"call pecobook.{command}(..., transform=..., resume=True) with that of the run."
        )
    if old.pop("command", command) != command:
        raise RunFolderError(f"--resume: '{out}' is not a run of 'pecobook {command}'.")
    if "value_range" not in old:
        raise RunFolderError(f"--resume: the run in '{out}' is of a version before 0.1.0: name another --out.")
    old = complete(old, to_dict(type(config)()))
    all_changed = changed_settings(old, to_dict(config))
    changed = longer.other_settings(all_changed, old, config)
    if all_changed and not changed and num_images:
        longer.check(old, config, num_images)
    if changed:
        raise RunFolderError(
            f"--resume: settings differ from those of the run in '{out}': {'; '.join(changed)}.\n"
            f"Give the settings of that run, or name another --out.{longer.remedy(changed, config)}"
        )


def _image_counts(splits: Splits) -> dict[str, int]:
    counts = {"training": len(splits.train), "held_out": len(splits.evaluation)}
    return counts | ({"classes": len(splits.train.classes)} if splits.train.classes else {})


def _write_settings(
    config: TrainConfig,
    files: dict[str, bytes],
    now: record.Record | None,
    notes: list[str],
    images: dict[str, int],
    out: Path,
) -> None:
    resumes, accept = bool(config.resume) and (out / "config.json").exists(), config.accept_data_change
    news = now
    if resumes and now is not None:
        found, news = compare_data(out, now, data=config.data, of="the run", accept=accept)
        notes = [*notes, *found]
    num_images = images.get("training", 0)
    if resumes and num_images:
        new = to_dict(config)
        old = complete(read_json(out / "config.json", _RUN), to_dict(type(config)()))
        if changed_settings({name: old[name] for name in new}, new):  # its length, as `_check_resume` has found
            notes = [*notes, longer.begin(out, old, config, num_images)]
            if "config.diff" in files:
                write_atomically(out / "config.diff", files["config.diff"])
    for note in notes:
        say(note)
    for name, data in files.items():
        if not (resumes and (out / name).exists()):  # the run may have been killed between the two
            write_atomically(out / name, data)
    _write_environment(out / "environment.json", notes, images)
    if news is not None:  # after environment.json, which records the change
        news.write(out)
    (out / "checkpoints").mkdir(exist_ok=True)
    (out / "samples").mkdir(exist_ok=True)


def _write_environment(file: Path, notes: list[str], images: dict[str, int]) -> None:
    """Write environment.json; if a resumed run had other versions, report them, and keep the earlier content.

    `notes` are sentences on changed data, which are kept too; `images` are the numbers of images and classes.
    """
    current = environment() | ({"images": images} if images else {})
    earlier: dict[str, Any] = {}
    try:
        earlier = read_json(file, _ENVIRONMENT, remedy="It is written anew.")
    except FileNotFoundError:
        pass  # a new run
    except RunFolderError as error:
        say(str(error))
    before, now = earlier.get("versions", {}), current["versions"]
    changes = [f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    if data_notes := [*(earlier.pop("data_notes", None) or []), *notes]:
        current["data_notes"] = data_notes
    if changes:
        say(f"Versions differ from those with which the run began: {', '.join(changes)}.")
        current["earlier"] = [*earlier.pop("earlier", []), earlier]
    elif earlier.get("earlier"):
        current["earlier"] = earlier["earlier"]
    write_json(file, current)


def stored_settings(config: TrainConfig, command: str, recipe: str = "") -> dict[str, Any]:
    """Return the settings as config.json stores them, without the flags of a single start."""
    single = dict.fromkeys(("resume", "overwrite", "dry_run", "verify_data", "accept_data_change"), False)
    more = {name: value for name, value in (("recipe", recipe), ("python", hooks())) if value}
    return {"command": command, **more, **to_dict(config), **single}


def command_line(arguments: list[str]) -> str:
    """Return this process's command, quoted so that it can be pasted into a shell; `arguments` is sys.argv."""
    program, *words = arguments
    if Path(program).name == "__main__.py":  # python -m pecobook
        return shlex.join([sys.executable, "-m", "pecobook", *words])
    return shlex.join([sys.executable, *arguments] if program.endswith(".py") else arguments)


def environment() -> dict[str, Any]:
    """Return library versions, the devices, the command line and the folder it was run in."""
    from importlib.metadata import version

    import torch

    names = ("pecobook", "torch", "torchvision", "timm", "lightning-fabric", "datasets", "numpy")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command_line": command_line(sys.argv),
        "working_directory": str(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "versions": {name: version(name) for name in names},
    }
