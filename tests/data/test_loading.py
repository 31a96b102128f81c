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
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data._utils import signal_handling

from pecobook.data import loading
from pecobook.data.loading import Batches, Parts, WorkerError, plan, reading_advice
from pecobook.data.stream import collate, join
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


# ----------------------------------------------------------------------------------------------------- memory and speed


@given(st.integers(1, 3000), st.integers(0, 300))
def test_parts__are_nearly_equal_and_hold_each_place_once(batch: int, size: int) -> None:
    places = [list(range(batch)), list(range(batch, 2 * batch))]
    parts = Parts(places, size)
    found = list(parts)
    assert [place for part in found for place in part] == list(range(2 * batch))
    assert len(found) == sum(map(parts.count, places))
    assert max(map(len, found)) <= (size or batch)
    assert max(map(len, found[: parts.count(places[0])])) <= -(-batch // parts.count(places[0]))


@given(st.integers(1, 5_000_000), st.integers(1, 256), st.integers(2**20, 2**36))
def test_plan__bounds_what_is_read_ahead(sample: int, workers: int, room: int) -> None:
    size, prefetch = plan(sample, workers, room)
    assert size >= 1
    assert 1 <= prefetch <= 4
    least = workers * sample  # an image for each process
    assert workers * prefetch * size * sample <= max(min(2**29, room // 4), least)


def test_plan__keeps_processes_busy_at_any_size_of_batch() -> None:
    assert plan(150_589, 16, 2**35) == (55, 4)  # 224 pixels: 0.5 GB where whole batches of 1,024 took 9.9
    assert plan(3 * 1024**2, 16, 2**35) == (2, 4)
    assert plan(150_589, 4, 2**26) == (13, 2)  # Docker's /dev/shm of 64 MB
    assert plan(0, 4, 2**35) == (16, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches__are_joined_from_their_parts(workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_PART_BYTES", 3 * 64 * 8)
    places = [list(range(start, start + 10)) for start in range(0, 60, 10)]
    dataset = Numbers(tmp_path / "flag", 25, kill(signal.SIGKILL))
    said: list[str] = []
    batches = list(Batches(dataset, places, collate=collate, join=join, workers=workers, on_failure=said.append))
    assert [batch["value"][:, 0].tolist() for batch in batches] == places
    assert len(said) == (workers > 0)  # killed in the middle of a batch, of which this process reads the other parts


def test_join__of_parts_where_nothing_could_be_read() -> None:
    one, other = {"image": torch.ones(2, 3), "skipped": ["a"]}, {"skipped": ["b"]}
    joined = join([one, other, one], torch.device("cpu"))
    assert joined["image"].shape == (4, 3)
    assert joined["skipped"] == ["a", "b", "a"]
    assert join([other]) == {"skipped": ["b"]}


def test_reading_advice__names_what_to_raise() -> None:
    assert reading_advice(0.1, 4, 16) == ""
    assert (
        reading_advice(0.5, 4, 16)
        == "50% of the time is data wait, with --workers 4: give --workers 8 (16 cores for each device here)."
    )
    assert "give --workers 15 (16" in reading_advice(0.9, 4, 16)
    assert "on 16 cores for each device: more cores, or smaller image files" in reading_advice(0.5, 15, 16)
    assert "more cores" in reading_advice(0.5, 0, 2)


def test_batches__are_read_by_forks_on_linux_unless_the_program_chose_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for chosen, expected in ((None, "fork"), ("spawn", None)):  # also where Python's own choice is another
        monkeypatch.setattr("multiprocessing.get_start_method", lambda *, chosen=chosen, **_: chosen)
        monkeypatch.setattr("sys.platform", "linux")
        assert loading._start_method() == expected
        monkeypatch.setattr("sys.platform", "darwin")
        assert loading._start_method() is None
