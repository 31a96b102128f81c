"""Processes that find each other under a name of their own, bounded waits, and what a lost process leads to."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store

from pecobook.engine import join as joining
from pecobook.engine.join import lists_for_children, told_of_lost_processes, watch_children
from pecobook.engine.siblings import LostProcessError
from pecobook.engine.world import World
from pecobook.utils.printer import of_run


def world(rank: int, size: int = 3) -> World:
    return World("torchrun", rank, size, rank, size)


def test_lists_for_children__are_found_by_processes_that_the_first_starts() -> None:
    with lists_for_children(starts_others=False) as none:
        assert none == ""
    with lists_for_children(starts_others=True) as folder:
        assert Path(folder).is_dir()
        with pytest.MonkeyPatch.context() as child:
            child.setenv("LOCAL_RANK", "1")
            child.setenv("WORLD_SIZE", "2")
            with lists_for_children(starts_others=True) as found:
                assert found == folder
        assert Path(folder).is_dir()
    assert not Path(folder).exists()
    assert "PECOBOOK_LISTS" not in os.environ


def agree(store: Store, rank: int, names: dict[int, str]) -> threading.Thread:
    def run() -> None:
        names[rank] = joining._agree(store, world(rank), joining._Limit(world(rank), "here:1"))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_agree__a_new_name_for_each_attempt_whatever_earlier_ones_left() -> None:
    store, seen = HashStore(), set()
    store.set("pecobook/hello/1", "a process that was killed")
    for _ in range(3):
        names: dict[int, str] = {}
        threads = [agree(store, rank, names) for rank in (0, 2)]
        time.sleep(0.1)  # the first has answered to the one that was killed
        for thread in [*threads, agree(store, 1, names)]:
            thread.join(10)
        assert len(names) == 3
        (name,) = set(names.values())
        seen.add(name)
    assert len(seen) == 3


def test_agree__ends_where_a_process_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "_MEET", 0.2)
    with pytest.raises(LostProcessError, match=r"Not all 3 processes came to here:1 within .* minutes") as caught:
        joining._agree(HashStore(), world(1), joining._Limit(world(1), "here:1"))
    assert caught.value.exit_code == 1
    assert not caught.value.on_all_ranks  # rank 1 prints it too, since rank 0 may be the one that is lost


def test_store__waits_quietly_for_the_first_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """PyTorch's store writes a stack trace for each attempt to reach a process that is not there yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(joining, "_TRY", timedelta(seconds=0.5))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    stores: dict[int, Store] = {}

    def open_store(rank: int) -> None:
        stores[rank] = joining._store(world(rank), joining._Limit(world(rank), "here:1"))

    second = threading.Thread(target=open_store, args=(1,))
    second.start()
    time.sleep(1.5)
    assert not stores
    open_store(0)
    second.join(20)
    stores[0].set("from", "first")
    assert stores[1].get("from") == b"first"
    assert capfd.readouterr().err == ""


def test_agree__a_signal_while_waiting_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "stop_requested", lambda: True)
    monkeypatch.setattr(joining, "_MEET_STOPPED", 0.2)
    with pytest.raises(SystemExit) as caught:
        joining._agree(HashStore(), world(0), joining._Limit(world(0), "here:1"))
    assert caught.value.code == 130


def test_store__a_process_that_the_first_one_left_alone_says_that_it_stops(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(joining, "stop_requested", lambda: True)
    monkeypatch.setattr(joining, "_MEET_STOPPED", 0.1)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nothing listens
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with of_run(quiet=True), pytest.raises(SystemExit):
            joining._store(world(1), joining._Limit(world(1), "here:1"))
    assert capsys.readouterr().err == "Stopped before the first step.\n"
    with of_run(quiet=True), pytest.raises(SystemExit):  # the first one is there, and says it
        joining._agree(HashStore(), world(1), joining._Limit(world(1), "here:1"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:123"),
        dist.DistBackendError("NCCL communicator was aborted on rank 1."),
    ],
)
def test_told_of_lost_processes__is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 2)
    with pytest.raises(LostProcessError, match="has ended or cannot be reached") as caught, told_of_lost_processes():
        raise error
    assert len(str(caught.value).splitlines()) == 2
    assert caught.value.on_all_ranks
    with pytest.raises(RuntimeError, match="a fault of the program"), told_of_lost_processes():
        raise RuntimeError("a fault of the program")


def test_watch_children__ends_this_process_when_one_was_killed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(joining, "_TIME_TO_END", (0.1, 0.1))
    children = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    ended: list[int] = []
    watch_children(children, end=ended.append)
    children[1].kill()
    assert children[0].wait(20) == -signal.SIGKILL
    stop = time.monotonic() + 10
    while not ended:
        assert time.monotonic() < stop
        time.sleep(0.01)
    assert ended == [1]
    assert "pecobook: Another process of the run has ended." in capsys.readouterr().err


_ALONE = """
import os, sys
from pecobook import cli
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_start__the_only_process_that_comes_ends_by_itself(images: Path, tmp_path: Path) -> None:
    """As the second one where the first was killed before it could be reached; SIGTERM ends it in seconds."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29581", "RANK": "1", "WORLD_SIZE": "2"}
    environment |= {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    words = ["contrast", "tiny", "--data", str(images), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, "-c", _ALONE, *words], env=environment, stderr=subprocess.PIPE, text=True
    )
    time.sleep(40)
    began = time.monotonic()
    process.terminate()
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    assert time.monotonic() - began < 30
    assert "Stopped before the first step." in text
    assert not re.search("Traceback", text)
