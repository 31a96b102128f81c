"""Processes of one machine that watch each other: one that is lost ends the others, one that leaves does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pecobook.engine import join as joining
from pecobook.engine import siblings
from pecobook.engine.siblings import LostProcessError, Siblings
from pecobook.engine.world import World

if sys.platform != "linux":
    pytest.skip("abstract sockets need Linux", allow_module_level=True)

_PROCESS = """
import sys, time
from pecobook.engine import siblings
from pecobook.engine.world import launched
siblings._TIME_TO_END = 0.2
with siblings.watched(launched()):
    while len(siblings.Siblings.current._connections) < 1:
        time.sleep(0.01)
    print("met", flush=True)
    deed = sys.stdin.readline().strip()
    if deed == "exit":
        sys.exit(0)
    if deed == "raise":
        raise ValueError("a fault of this process alone")
print("left", flush=True)
"""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes that have met."""
    world = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "there", "MASTER_PORT": str(os.getpid())}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS],
            env={**os.environ, **world, "RANK": str(2 + local), "LOCAL_RANK": str(local)},  # on the second machine
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for local in (0, 1)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "met\n"
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("deed", ["kill", "raise"])
def test_siblings__the_other_ends_when_one_is_lost(
    number: int, deed: str, processes: list[subprocess.Popen[str]]
) -> None:
    one, other = processes[number], processes[1 - number]
    if deed == "kill":
        one.send_signal(signal.SIGKILL)
    else:
        one.communicate("raise\n", timeout=20)
    assert other.wait(20) == LostProcessError.exit_code  # while it waits for its standard input
    _, text = other.communicate()
    assert text.startswith(f"pecobook: Process {2 + number} of the run has ended.\n")
    assert "--resume" in text
    assert len(text.splitlines()) == 2


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("deed", ["return", "exit"])
def test_siblings__the_other_goes_on_when_one_leaves(
    number: int, deed: str, processes: list[subprocess.Popen[str]]
) -> None:
    processes[number].communicate(f"{deed}\n", timeout=20)
    time.sleep(0.6)
    assert processes[1 - number].poll() is None
    out, text = processes[1 - number].communicate("return\n", timeout=20)
    assert (out, text, processes[1 - number].returncode) == ("left\n", "", 0)


@pytest.mark.parametrize("number", [0, 1])
def test_join__ends_soon_where_a_process_of_this_machine_never_comes(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(siblings, "_COME", 0.3)
    monkeypatch.setenv("MASTER_PORT", f"{os.getpid()} {number}")
    world = World("torchrun", number, 2, number, 2)
    limit, began = joining._Limit(world, "here:1"), time.monotonic()

    def wait() -> None:
        while True:
            limit.wait()

    with siblings.watched(world), pytest.raises(LostProcessError) as caught:
        wait()
    assert time.monotonic() - began < 5
    assert str(caught.value).startswith(f"Process {1 - number} of the run did not come within 0 seconds.\n")


def test_siblings__a_restart_watches_anew_whatever_the_last_attempt_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", f"{os.getpid()} again")
    monkeypatch.setattr(siblings, "_TIME_TO_END", 0.1)
    for _ in range(3):
        ended: list[int] = []
        first, second = (Siblings(World("torchrun", rank, 2, rank, 2), ended.append) for rank in (0, 1))
        stop = time.monotonic() + 20
        while not (first._connections and second._connections):
            assert time.monotonic() < stop
            time.sleep(0.01)
        second.leave(in_order=False)
        while ended != [1]:
            assert time.monotonic() < stop
            time.sleep(0.01)
        assert first.reason == "Process 1 of the run has ended"
        assert second.reason == ""
        first.leave(in_order=True)


def test_watched__is_nothing_for_one_process() -> None:
    for world in (None, World("srun", 1, 2, 0, 1)):
        with siblings.watched(world):
            assert Siblings.current is None
            assert siblings.known_loss() == ""
