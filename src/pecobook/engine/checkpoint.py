"""Checkpoints: weights, optimizer state and one integer, in a file that is either complete or absent.

`checkpoints/step-00001000/state.pt` is written under a temporary folder name, flushed and renamed; the last k are kept.
Its checksum is stored next to it and verified on loading. The file holds full tensors whatever the strategy, so a run
can resume on another number of devices. In fp16 the file also holds the loss scale.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from pecobook.errors import RunFolderError, first_line, loading_reason
from pecobook.utils.checksums import add_checksum, damage
from pecobook.utils.distributed import on_first_rank
from pecobook.utils.files import sync_folder
from pecobook.utils.printer import say


class Stateful(Protocol):
    """An object with a small state of plain values, such as the loss scale of fp16."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""


def save(
    folder: Path,
    *,
    step: int,
    stage: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
    always: int = 0,
    precision: Stateful | None = None,
) -> None:
    """Write the checkpoint of `step` and delete all but the last `keep` and that of step `always`.

    All ranks call this; rank 0 writes.

    Raises:
        RunFolderError: on all ranks, if the checkpoint cannot be written.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model_state, optimizer_state = get_state_dict(stage, optimizer, options=options)
    scale = precision.state_dict() if precision else {}
    state = {"step": step, "model": model_state, "optimizer": optimizer_state, "precision": scale}

    def write() -> None:
        _write(folder, step, state)
        delete_old(folder, keep, always)

    on_first_rank(write)


def delete_old(folder: Path, keep: int, always: int = 0) -> None:
    """Delete all checkpoints, including partly deleted ones, except the last `keep` and that of step `always`."""
    kept = [_name(step) for step in steps(folder)[-keep:]]
    for path in folder.glob("step-*"):
        if path.name.removeprefix("step-").isdigit() and kept and path.name < kept[0] and path.name != _name(always):
            _delete(path)


def delete_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of all steps after `step`, the newest first."""
    for later in reversed([saved for saved in steps(folder) if saved > step]):
        _delete(folder / _name(later))


def _delete(path: Path) -> None:
    """Delete one checkpoint, but none of the user's files in its folder."""
    for name in ("state.pt", "state.pt.sha256"):
        (path / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.rmdir()


def _write(folder: Path, step: int, state: dict[str, Any]) -> None:
    temporary, final = folder / f".{_name(step)}.tmp", folder / _name(step)
    for incomplete in folder.glob(".step-*.tmp"):  # half-written when a run was killed
        shutil.rmtree(incomplete, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        with (temporary / "state.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        add_checksum(temporary / "state.pt")
        if final.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(final)
        temporary.rename(final)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunFolderError(
            f"The checkpoint of step {step} cannot be written to '{folder}': {first_line(error).rstrip('.')}\n"
            "Earlier checkpoints are complete. Make room, then continue with --resume."
        ) from None


def load(folder: Path, *, stage: nn.Module, optimizer: torch.optim.Optimizer, precision: Stateful | None = None) -> int:
    """Load the newest intact checkpoint into `stage` and `optimizer`; return its step, or 0 if there is none.

    A checkpoint that does not match its checksum is renamed to `step-00001000.damaged`, with a message on stderr, and
    the one before it is loaded. All ranks call this.

    Raises:
        RunFolderError: all checkpoints are damaged, or the newest belongs to another model.
    """
    step = on_first_rank(lambda: _newest_whole(folder))
    if step == 0:
        return 0
    path = folder / _name(step) / "state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        set_state_dict(
            stage, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
        )
        if precision and state["precision"]:
            precision.load_state_dict(state["precision"])
        return int(state["step"])
    except (OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError) as error:
        before = [saved for saved in steps(folder) if saved < step]
        older = f" Delete that folder to continue from step {before[-1]}." if before else ""
        raise RunFolderError(f"'{path}' cannot be loaded: {loading_reason(error)}.{older}") from None


def _newest_whole(folder: Path) -> int:
    """Return the step of the newest intact checkpoint, or 0 if there is no checkpoint."""
    saved_steps = steps(folder)
    for step in reversed(saved_steps):
        sentence = damage([folder / _name(step) / "state.pt"])
        if sentence is None:
            return step
        if step == saved_steps[0]:
            raise RunFolderError(f"{sentence} No checkpoint before it is left: start the run again with --overwrite.")
        aside = folder / f"{_name(step)}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        (folder / _name(step)).rename(aside)
        say(f"{sentence}\nIt is set aside as '{aside.name}'; the run continues from before.")
    if (folder.parent / "metrics.jsonl").exists():  # not where `--resume auto` starts a new run
        say(f"There is no checkpoint in '{folder}': the run starts at its first step.")
    return 0


def steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, ascending."""
    numbers = (path.name.removeprefix("step-") for path in folder.glob("step-*") if (path / "state.pt").is_file())
    return sorted(int(number) for number in numbers if number.isdigit())


def _name(step: int) -> str:
    return f"step-{step:08d}"
