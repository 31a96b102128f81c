"""Data-loading processes that are killed: one sentence with the remedy, and no batch is lost where it can be read."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data._utils import signal_handling

from pecobook.data import loading
from pecobook.data.loading import Batches, WorkerError
from pecobook.data.stream import collate
from pecobook.errors import DataError


class Numbers:
    """Samples that hold their place; in a data-loading process the place `at` calls `act`, once."""

    def __init__(self, flag: Path, at: int, act: Callable[[], None]) -> None:
        self.flag, self.at, self.act, self.parent = flag, at, act, os.getpid()

    def __getitem__(self, place: int) -> dict[str, Any]:
        if place == self.at and os.getpid() != self.parent and not self.flag.exists():
            self.flag.touch()
            self.act()
        return {"value": torch.full((64,), place), "skipped": []}


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def values(batches: Batches) -> list[int]:
    return [int(batch["value"][0, 0]) for batch in batches]


PLACES = [[place] for place in range(12)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_batches__this_process_reads_the_rest_after_a_kill(number: int, tmp_path: Path) -> None:
    said: list[str] = []
    dataset = Numbers(tmp_path / "flag", 5, kill(number))
    signal_handling._SIGCHLD_handler_set = False
    signal_handling._set_SIGCHLD_handler()  # as another loader of this process does, with a handler that raises
    batches = Batches(dataset, PLACES, collate=collate, workers=2, on_failure=said.append)
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    assert values(batches) == list(range(12))
    (sentence,) = said
    assert sentence.startswith(f"A data-loading process was killed ({signal.Signals(number).name})")
    assert "Take fewer --workers (now 2)" in sentence


def test_batches__a_kill_without_rescue_is_an_error(tmp_path: Path) -> None:
    dataset = Numbers(tmp_path / "flag", 5, kill(signal.SIGKILL))
    with pytest.raises(WorkerError, match=r"was killed \(SIGKILL\), most likely because memory ran out\. Take fewer"):
        list(Batches(dataset, PLACES, collate=collate, workers=2))
    dataset = Numbers(tmp_path / "other", 5, kill(signal.SIGKILL))
    with pytest.raises(WorkerError, match=r"memory ran out\. Free memory, then start again\.$"):
        list(Batches(dataset, PLACES, collate=collate, workers=1, flag=""))


def test_batches__an_image_that_crashes_the_decoder_is_not_read_again(tmp_path: Path) -> None:
    """The main process would crash too."""
    dataset = Numbers(tmp_path / "flag", 5, kill(signal.SIGSEGV))
    with pytest.raises(WorkerError, match=r"was killed \(SIGSEGV\)"):
        list(Batches(dataset, PLACES, collate=collate, workers=2, on_failure=print))


def test_batches__a_bus_error_is_told_with_the_size_of_shared_memory(tmp_path: Path) -> None:
    said: list[str] = []
    dataset = Numbers(tmp_path / "flag", 5, kill(signal.SIGBUS))
    assert values(Batches(dataset, PLACES, collate=collate, workers=1, on_failure=said.append)) == list(range(12))
    assert re.match(r"A data-loading process found no room in /dev/shm, which has [\d,]+ MB\. Give it more", said[0])


def test_batches__full_shared_memory_is_no_endless_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(_value: Any) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_7>: No space left on device (28)")

    monkeypatch.setattr(loading, "_share", no_room)
    said: list[str] = []
    dataset = Numbers(tmp_path / "flag", -1, kill(0))
    assert values(Batches(dataset, PLACES, collate=collate, workers=1, on_failure=said.append)) == list(range(12))
    assert "found no room in /dev/shm" in said[0]


def test_batches__no_memory_in_a_process(tmp_path: Path) -> None:
    def no_memory() -> None:
        raise MemoryError

    said: list[str] = []
    dataset = Numbers(tmp_path / "flag", 3, no_memory)
    assert values(Batches(dataset, PLACES, collate=collate, workers=2, on_failure=said.append)) == list(range(12))
    assert said[0].startswith("A data-loading process had no memory left. Take fewer")


def test_batches__an_error_of_the_data_comes_without_a_traceback(tmp_path: Path) -> None:
    def refuse() -> None:
        raise DataError("100 images in a row cannot be read, the last is a.png (AttributeError: x).")

    dataset = Numbers(tmp_path / "flag", 3, refuse)
    with pytest.raises(DataError) as caught:
        list(Batches(dataset, PLACES, collate=collate, workers=2, on_failure=print))
    assert str(caught.value) == "100 images in a row cannot be read, the last is a.png (AttributeError: x)."


def test_batches__another_error_stays_as_it_is(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("a fault of the program")

    dataset = Numbers(tmp_path / "flag", 3, fail)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        list(Batches(dataset, PLACES, collate=collate, workers=2, on_failure=print))
