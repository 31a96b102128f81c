"""The pool of two processes itself, which every test of a collective depends on."""

from __future__ import annotations

import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pecobook.data import folders
from pecobook.errors import DataError, PreflightError, RunFolderError
from pecobook.utils import distributed
from pecobook.utils.distributed import long_on_first_rank, made_by_first_rank, sharing
from tests.data.sources import write
from tests.distributed import TwoProcesses


def add_up(rank: int, world_size: int, value: int) -> tuple[int, float]:
    total = torch.tensor(float(value + rank))
    dist.all_reduce(total)
    return world_size, float(total)


def fail(rank: int, world_size: int, error: Exception) -> None:
    if rank == 1:
        raise error


def fail_before_collective(rank: int, world_size: int) -> None:
    if rank == 1:
        raise DataError("no data here")
    dist.barrier()


def hang(rank: int, world_size: int) -> None:
    time.sleep(60)


def die(rank: int, world_size: int) -> None:
    os._exit(1)


def draw(rank: int, world_size: int) -> float:
    return torch.rand(()).item()


def test_run__joins_two_ranks(two_processes: TwoProcesses) -> None:
    assert two_processes.run(add_up, 3) == [(2, 7.0), (2, 7.0)]


def test_run__begins_with_the_same_seed(two_processes: TwoProcesses) -> None:
    assert two_processes.run(draw) == two_processes.run(draw)


def test_run__raises_the_error_of_a_rank_and_stays_usable(two_processes: TwoProcesses) -> None:
    with pytest.raises(DataError, match="gone") as caught:
        two_processes.run(fail, DataError("gone"))
    assert "On rank 1" in caught.value.__notes__[0]
    assert "raise error" in caught.value.__notes__[0]
    assert two_processes.run(add_up, 0)[0] == (2, 1.0)


def test_run__quotes_an_error_that_cannot_be_pickled(two_processes: TwoProcesses) -> None:
    with pytest.raises(RuntimeError, match="PreflightError: first\nsecond"):
        two_processes.run(fail_with_preflight)


def fail_with_preflight(rank: int, world_size: int) -> None:
    raise PreflightError([DataError("first"), DataError("second")])


def test_run__ends_processes_that_hang_or_die_and_starts_again() -> None:
    pool = TwoProcesses(straggler=0.5)
    try:
        with pytest.raises(DataError, match="no data here"):
            pool.run(fail_before_collective)
        with pytest.raises(TimeoutError, match="did not answer"):
            pool.run(hang, limit=0.5)
        with pytest.raises(RuntimeError, match="died"):
            pool.run(die)
    finally:
        pool.close()


def long_work(rank: int, _world_size: int, fails: bool) -> tuple[list[int], str]:
    """Return the ranks that worked, and the error."""
    worked: list[int] = []

    def work() -> str:
        time.sleep(0.3)
        worked.append(rank)
        if fails:
            raise RunFolderError("no room")
        return "done"

    try:
        return worked, long_on_first_rank(work, period=0.05)
    except RunFolderError as error:
        return worked, f"{error.on_all_ranks} {error}"


@pytest.mark.parametrize(("fails", "said"), [(False, "done"), (True, "True no room")])
def test_long_on_first_rank(fails: bool, said: str, two_processes: TwoProcesses) -> None:
    assert two_processes.run(long_work, fails) == [([0], said), ([], said)]
    assert long_on_first_rank(lambda: 3) == 3


def share_listing(rank: int, world_size: int, folder: str) -> tuple[int, list[bytes], list[int], int]:
    distributed._PART_BYTES = 100  # so that the listing goes in many parts
    entries, calls = folders._entries, 0

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return entries(*arguments)

    folders._entries = counted  # type: ignore[assignment]
    try:
        with sharing():
            found = folders.folder_contents(folder, Path(folder))
            again = folders.folder_contents(folder, Path(folder))
    finally:
        folders._entries = entries
    part = found.parts["train"]
    assert part.labels is not None
    assert len(again.parts["train"].rows) == len(part.rows)
    return calls, [*(part.store.files(part.rows) or ())], part.labels.codes.tolist(), len(part.rows)


def test_sharing__one_rank_lists_a_folder_for_all(two_processes: TwoProcesses, tmp_path: Path) -> None:
    for number in range(60):
        write(tmp_path / "abc"[number % 3] / f"a long name of image {number:03}.png", number)
    (calls, *first), (other_calls, *second) = two_processes.run(share_listing, str(tmp_path))
    assert first == second
    assert (calls, other_calls) == (4, 0)  # the folder and its three subfolders, once, on the first rank alone
    assert first[2] == 60


def test_sharing__a_process_that_is_started_later_lists_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        write(tmp_path / "images" / "ab"[number % 2] / f"{number}.png", number)
    (tmp_path / "lists").mkdir()
    calls, entries = [], folders._entries

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return entries(*arguments)

    monkeypatch.setattr(folders, "_entries", counted)
    for is_first in (True, False):
        with sharing(str(tmp_path / "lists"), is_first=is_first):
            found = folders.folder_contents(str(tmp_path / "images"), tmp_path / "images")
        assert len(found.parts["train"].rows) == 6
        assert len(calls) == 3  # the folder and its two subfolders, once
    shutil.rmtree(tmp_path / "lists")  # nothing can be written there: each process makes its own
    made = []
    for is_first in (True, False):
        with sharing(str(tmp_path / "lists"), is_first=is_first):
            made.append(made_by_first_rank("a", partial(int, is_first)))
    assert made == [1, 0]


def share_late(rank: int, world_size: int) -> list[Any]:
    """Rank 0 fails at one thing, and never asks for another."""

    def make() -> int:
        if rank == 0:
            raise DataError("gone")
        return 10 + rank

    values: list[Any] = []
    with sharing():
        try:
            values.append(made_by_first_rank("a", make))
        except DataError:
            values.append("failed")
        if rank:
            values.append(made_by_first_rank("b", lambda: 20 + rank))
    values.append(made_by_first_rank("a", lambda: 30 + rank))
    return values


def test_sharing__no_rank_waits_for_what_the_first_does_not_make(two_processes: TwoProcesses) -> None:
    assert two_processes.run(share_late) == [["failed", 30], [11, 21, 31]]
    assert two_processes.run(share_late) == [["failed", 30], [11, 21, 31]]
