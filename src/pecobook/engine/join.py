"""How the processes of a run find each other, and all end in bounded time if one of them is lost.

torchrun keeps one address store for all attempts, so a restarted process may read the address of one that was killed,
and wait for it. Processes therefore agree on a new name for each attempt, under which they put their addresses.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from pecobook.engine.siblings import LostProcessError, known_loss, lost
from pecobook.engine.signals import stop_requested
from pecobook.engine.world import World, is_leader, launched
from pecobook.errors import first_line
from pecobook.utils.distributed import world_size
from pecobook.utils.printer import show

_MEET = 600.0
"""Seconds within which all processes must have arrived; on a large cluster they start minutes apart."""
_MEET_STOPPED = 10.0
"""Seconds that the others are given after a signal to stop: nothing is lost yet."""
_TRY = timedelta(seconds=5)
_CONNECT = timedelta(minutes=2)
_COLLECTIVE = timedelta(minutes=30)
"""Longest wait in a collective operation, the same as Fabric's."""
_TIME_TO_END = (20.0, 60.0)
"""Seconds within which this process notices that another was killed, or that another left, and ends by itself."""
_LOST = re.compile(r"gloo|nccl|connection (?:was )?(?:closed|reset|refused)|broken pipe|timed out waiting|socket", re.I)


def join(world: World, device: torch.device) -> None:
    """Meet the other processes at MASTER_ADDR and MASTER_PORT, and start `torch.distributed`.

    Raises:
        LostProcessError: not all processes arrived in time, or one ended meanwhile.
        SystemExit: with code 130, if this process has been asked to stop and others have not arrived.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    limit = _Limit(world, place)
    cuda = {"device_id": device} if device.type == "cuda" else {}
    try:
        store = _store(world, limit)
        store.set_timeout(_CONNECT)
        own = PrefixStore(_agree(store, world, limit), store)
        rank, size = world.rank, world.size
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=_CONNECT, **cuda)  # type: ignore[arg-type]
        # Its public name since PyTorch 2.14.
        getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)(_COLLECTIVE)
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            text = f"{place} is in use by another program: set MASTER_PORT to a free port."
            raise LostProcessError(text) from None
        raise lost(f"The processes of the run could not connect at {place}: {first_line(error)}", world.rank) from None


_LISTS = "PECOBOOK_LISTS"


@contextmanager
def lists_for_children(*, starts_others: bool) -> Iterator[str]:
    """Yield the folder in which the processes that the first one starts find what it has listed.

    It is the same for all, and exists until the first process leaves this context; empty if there are no such
    processes, or if no folder can be created.
    """
    if launched() is not None or not is_leader():
        yield os.environ.get(_LISTS, "") if launched() is None else ""
        return
    folder = ""
    with suppress(OSError):
        folder = tempfile.mkdtemp(prefix="pecobook-") if starts_others else ""
    os.environ[_LISTS] = folder
    try:
        yield folder
    finally:
        os.environ.pop(_LISTS, None)
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


class _Limit:
    """The time left for all processes to arrive."""

    def __init__(self, world: World, place: str) -> None:
        self.world, self.place, self.end, self.stopped = world, place, time.monotonic() + _MEET, False
        self.is_alone = False
        """Whether the first process, which reports for all, is missing."""

    def wait(self) -> None:
        """Wait for a moment. Raises LostProcessError or SystemExit when time has run out."""
        if stop_requested() and not self.stopped:
            self.stopped, self.end = True, min(self.end, time.monotonic() + _MEET_STOPPED)
        if known_loss() and not self.stopped:
            raise lost(known_loss(), self.world.rank)
        if time.monotonic() > self.end:
            if self.stopped:
                show("Stopped before the first step.", always=self.is_alone)
                raise SystemExit(130)
            raise lost(
                f"Not all {self.world.size} processes came to {self.place} within {_MEET / 60:.0f} minutes: one has "
                "ended, or cannot reach that address.",
                self.world.rank,
            )
        time.sleep(0.02)


def _store(world: World, limit: _Limit) -> TCPStore:
    """Open torchrun's store, or that of the first process."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    opens = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while True:
        while not opens and not _answers(host, port):
            limit.is_alone = True
            limit.wait()
        limit.is_alone = False
        try:
            return TCPStore(
                host, port, world.size, is_master=opens, timeout=_TRY, wait_for_workers=False, multi_tenant=True
            )
        except RuntimeError as error:  # the first process is not there yet
            if "EADDRINUSE" in str(error):
                raise
            limit.wait()


def _answers(host: str, port: int) -> bool:
    """Return whether a store is reachable; querying the store itself would print PyTorch's stack trace."""
    try:
        socket.create_connection((host, port), timeout=_TRY.total_seconds()).close()
    except OSError:
        return False
    return True


def _agree(store: Store, world: World, limit: _Limit) -> str:
    """Return a name that all processes of this attempt share, and those of earlier attempts do not.

    Each process leaves its own number, and the first one answers it with the name. It may answer one that was killed;
    it then finds the number of the one that came instead.
    """

    def await_key(key: str) -> str:
        while not store.check([key]):
            limit.wait()
        return str(store.get(key).decode())

    if world.rank:
        number = uuid.uuid4().hex
        store.set(f"pecobook/hello/{world.rank}", number)
        name = await_key(f"pecobook/welcome/{number}")
        store.set(f"{name}/{world.rank}", "here")
        await_key(f"{name}/all")
        return name
    name, answered = f"pecobook/{uuid.uuid4().hex}", dict.fromkeys(range(1, world.size), "")
    while answered:
        for rank, before in list(answered.items()):
            if store.check([f"{name}/{rank}"]):
                del answered[rank]
            elif store.check([f"pecobook/hello/{rank}"]):
                number = store.get(f"pecobook/hello/{rank}").decode()
                if number != before:
                    store.set(f"pecobook/welcome/{number}", name)
                    answered[rank] = number
        limit.wait()
    store.set(f"{name}/all", "here")
    return name


# ------------------------------------------------------------------------------------------------------ lost processes


@contextmanager
def told_of_lost_processes() -> Iterator[None]:
    """Turn the error of a broken connection into a sentence."""
    try:
        yield
    except RuntimeError as error:
        is_lost = isinstance(error, dist.DistError) or _LOST.search(str(error))
        if world_size() == 1 or not is_lost or isinstance(error, torch.OutOfMemoryError):
            raise
        raise lost("Another process of the run has ended or cannot be reached.", dist.get_rank()) from None


def watch_children(children: Sequence[subprocess.Popen[bytes]], end: Callable[[int], None] = os._exit) -> None:
    """Watch the ranks that this first rank has started, and end all if one has failed and this one has not noticed.

    It replaces Fabric's watcher, which kills this process silently, even while it is shutting down cleanly.
    """

    def watch() -> None:
        while not any(codes := [child.poll() or 0 for child in children]):
            if all(child.returncode == 0 for child in children):
                return
            time.sleep(0.5)
        time.sleep(_TIME_TO_END[min(codes) >= 0])
        show(f"pecobook: {lost('Another process of the run has ended.', 0)}")
        for child in children:
            child.send_signal(signal.SIGKILL)
        end(LostProcessError.exit_code)

    threading.Thread(target=watch, daemon=True, name="children-watch").start()
