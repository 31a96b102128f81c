"""The run folder: who may write it, and what stands in it before the first step.

config.json  environment.json  metrics.jsonl  train.log  samples/  checkpoints/  export/
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from pecobook.errors import RunFolderError
from pecobook.settings.training import TrainConfig
from pecobook.settings.values import changed_settings, complete, to_dict
from pecobook.utils.files import write_atomically
from pecobook.utils.folder_lock import LOCK_FILES, FolderLock

_OURS = ("config.json", "environment.json", "metrics.jsonl", "train.log", "samples", "checkpoints", "export")


def check(config: TrainConfig, command: str) -> None:
    """Raise RunFolderError when `config.out` cannot be used as asked. Changes nothing."""
    if not config.out:
        raise RunFolderError("--out is missing: name the run folder to write, for example --out runs/first.")
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"--out '{out}' is a file: name a folder.")
    filled = out.is_dir() and any(path.name not in LOCK_FILES for path in out.iterdir())
    if filled and not (config.resume or config.overwrite):
        raise RunFolderError(
            f"--out '{out}' is not empty: go on with --resume, delete it with --overwrite, or name another."
        )
    if config.resume:
        _check_resume(config, command, out)
    if config.overwrite and filled and not _is_run(out):
        raise RunFolderError(f"--overwrite: '{out}' does not look like a run folder of pecobook, so it is not deleted.")
    parent = next(parent for parent in [out, *out.absolute().parents] if parent.exists())
    if not parent.is_dir():
        raise RunFolderError(f"--out '{out}' cannot be made: '{parent}' is a file.")
    if not os.access(parent, os.W_OK):
        raise RunFolderError(f"--out '{out}' cannot be written: no permission in '{parent}'.")


def _check_resume(config: TrainConfig, command: str, out: Path) -> None:
    file = out / "config.json"
    if not file.is_file():
        raise RunFolderError(f"--resume: there is no run in '{out}'. Leave --resume out to start one.")
    try:
        old = dict(json.loads(file.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise RunFolderError(f"--resume: '{file}' cannot be read ({error}).") from None
    if old.pop("command", command) != command:
        raise RunFolderError(f"--resume: '{out}' is not a run of 'pecobook {command}'.")
    changed = changed_settings(complete(old, to_dict(type(config)())), to_dict(config))
    if changed:
        raise RunFolderError(
            f"--resume: settings differ from those the run in '{out}' began with: {'; '.join(changed)}.\n"
            "Give the same ones, or name another --out."
        )


def _is_run(out: Path) -> bool:
    try:  # many a folder holds a config.json; one of ours names its command
        settings = json.loads((out / "config.json").read_text())
    except (OSError, ValueError):
        return all(path.name in _OURS or path.name in LOCK_FILES for path in out.iterdir())
    return isinstance(settings, dict) and {"command", "data", "out"} <= settings.keys()


def prepare(config: TrainConfig, command: str) -> FolderLock:
    """Make the folder, lock it, and write config.json and environment.json. Returns the lock."""
    out = Path(config.out)
    held = None
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = FolderLock(out)
        check(config, command)  # again: another run may have begun or ended here since preflight
        if config.overwrite:
            for path in [path for path in out.iterdir() if path.name not in LOCK_FILES]:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (out / "checkpoints").mkdir(exist_ok=True)
        (out / "samples").mkdir(exist_ok=True)
        if not (config.resume and (out / "config.json").exists()):
            settings = {"command": command, **to_dict(config), "resume": False, "overwrite": False}
            write_atomically(out / "config.json", (json.dumps(settings, indent=2) + "\n").encode())
        write_atomically(out / "environment.json", (json.dumps(environment(), indent=2) + "\n").encode())
    except (OSError, RunFolderError) as error:
        if held is not None:
            held.release()
        if isinstance(error, RunFolderError):
            raise
        raise RunFolderError(f"--out '{out}' cannot be written: {error}") from None
    return held


def environment() -> dict[str, Any]:
    """Versions, device and command line."""
    from importlib.metadata import version

    import torch

    names = ("pecobook", "torch", "torchvision", "timm", "lightning-fabric", "datasets", "numpy")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "command_line": " ".join(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "versions": {name: version(name) for name in names},
    }
