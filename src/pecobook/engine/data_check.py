"""Compares the data of a run or a token bank with the record in its folder, before anything is written there."""

from __future__ import annotations

from pathlib import Path

from pecobook.data import record
from pecobook.data.record import Record
from pecobook.data.tokens import bank_layouts, read_bank_config, read_skipped
from pecobook.errors import DataError, RunFolderError


def compare_data(
    folder: Path, now: Record, *, data: str, of: str, accept: bool, may_accept: bool = True
) -> tuple[list[str], Record | None]:
    """Compare the data with the record in a folder that is being resumed.

    Args:
        folder: the run folder or token bank.
        now: the current record.
        data: the value of --data.
        of: "the run" or "the token bank".
        accept: whether the data may have changed (--accept-data-change).
        may_accept: whether names other than those recorded can be accepted.

    Returns:
        sentences for the user, and the record to write into the folder, or None if the folder already has the same.

    Raises:
        RunFolderError: the data have changed, and the change is not accepted.
    """
    before = record.read(folder)
    if before is None:
        return [f"{of[0].upper()}{of[1:]} in '{folder}' has no record of its data yet: it is written now."], now
    comparison = record.compare(before, now)
    changed = f"'{data}' has changed since {of} in '{folder}' began: {comparison}."
    accept &= may_accept or comparison.same_names
    if comparison.differences and not accept:
        remedy = "restore them, or name another --out."
        if may_accept or comparison.same_names:
            remedy = "restore them, or continue with the data as they are with --accept-data-change."
        raise RunFolderError(f"--data {changed}\nTo resume, {remedy}")
    notes = [f"--accept-data-change: {changed}"] if comparison.differences else []
    notes += [comparison.note] if comparison.note else []
    return notes, comparison.record if comparison.is_new else None


def check_bank(bank: str, now: Record, *, data: str) -> list[str]:
    """Return sentences that compare a token bank with its images.

    A bank of an earlier version has no record; its names were compared already. An image that could not be read at that
    time stays left out, so it may have been repaired.

    Raises:
        DataError: the images are not those that the bank was made from.
    """
    before = record.read(Path(bank))
    if before is None:
        return []
    layouts = bank_layouts(read_bank_config(Path(bank))).values()
    unread = [error.name for layout in layouts for error in read_skipped(Path(bank), layout).values()]
    comparison = record.compare(before, now, unread=unread)
    if comparison.differences:
        raise DataError(
            f"--tokens '{bank}' is of other images than --data '{data}': {comparison}.\n"
            "Make a bank of these images with 'pecobook tokenize'. If the images are the same, repeat the bank's "
            "command with --resume --accept-data-change."
        )
    return [f"--tokens '{bank}': {comparison.note}"] if comparison.note else []
