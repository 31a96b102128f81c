"""The processes of a run on one machine watch each other, so that the loss of one is noticed immediately.

Each process keeps a connection to the first one on its machine, which the kernel closes when a process ends, however it
ends. A process that leaves cleanly announces it. Without torchrun or srun, which end the others, gloo notices a lost
process at the next exchange and NCCL only after its timeout, and neither exists before the processes meet.

The module does not import torch, since a process can be lost while importing it. It needs Linux.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator

from pecobook.engine.world import World
from pecobook.errors import PecobookError
from pecobook.utils.printer import show

_COME = 60.0
"""Seconds within which all processes on one machine must have arrived; they are started together."""
_TIME_TO_END = 20.0
"""Seconds within which this process notices the loss of another by itself, and ends cleanly."""
_HELLO, _LEFT = b"+", b"-"


class LostProcessError(PecobookError):
    """Another process of the run has ended or cannot be reached."""

    exit_code = 1


def lost(reason: str, rank: int) -> LostProcessError:
    """Return the error, which the first two ranks print, since one of them may be lost."""
    error = LostProcessError(
        f"{reason.rstrip('.')}.\nIts own message or the log of the system says why (a process may have been killed for "
        "lack of memory). Continue from the last checkpoint with --resume."
    )
    error.on_all_ranks = rank > 1
    return error


class Siblings:
    """The connections of this process to the other processes of its run on the same machine.

    Args:
        world: the processes of the run.
        end: ends this process if it has not noticed the loss of another.
    """

    current: Siblings | None = None

    def __init__(self, world: World, end: Callable[[int], None] = os._exit) -> None:
        self.reason = ""
        """The known problem: a process that has ended, or that has not arrived."""
        self._world, self._end, self._has_left = world, end, False
        self._connections: list[socket.socket] = []
        self._stop = time.monotonic() + _COME
        work = self._connect if world.local_rank else self._accept
        threading.Thread(target=work, daemon=True, name="siblings").start()

    def leave(self, *, in_order: bool) -> None:
        """Close the connections; unless `in_order`, the others regard this process as lost."""
        self._has_left = True
        for connection in self._connections:
            with contextlib.suppress(OSError):
                if in_order:
                    connection.sendall(_LEFT)
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        first, missing = self._world.rank, set(range(1, self._world.local_size))
        with socket.socket(socket.AF_UNIX) as listener:
            if not self._bound(listener):
                return
            while missing and not self._has_left:
                listener.settimeout(0.5)
                try:
                    connection = listener.accept()[0]
                    connection.settimeout(5)
                    connection.sendall(_HELLO)
                    rank = connection.recv(4)
                except OSError:
                    if time.monotonic() > self._stop:
                        names = ", ".join(str(first + local) for local in sorted(missing))
                        self.reason = f"Process {names} of the run did not come within {_COME:.0f} seconds"
                        return
                    continue
                if len(rank) == 4 and _user(connection) == os.getuid():
                    missing.discard(local := struct.unpack("i", rank)[0])
                    threading.Thread(target=self._watch, args=(connection, first + local), daemon=True).start()

    def _bound(self, listener: socket.socket) -> bool:
        while time.monotonic() < self._stop and not self._has_left:
            try:
                listener.bind(_address(self._world))
                listener.listen(self._world.local_size)
                return True
            except OSError:  # held by a process of an earlier attempt that is about to end
                time.sleep(0.2)
        return False

    def _connect(self) -> None:
        first = self._world.rank - self._world.local_rank
        while time.monotonic() < self._stop and not self._has_left:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(5)
            try:
                connection.connect(_address(self._world))
                if connection.recv(1) == _HELLO and _user(connection) == os.getuid():
                    connection.sendall(struct.pack("i", self._world.local_rank))
                    self._watch(connection, first)
                    return
            except (ConnectionError, TimeoutError):
                pass
            except OSError:  # this system does not allow such connections
                return
            connection.close()
            time.sleep(0.1)
        self.reason = f"Process {first} of the run did not come within {_COME:.0f} seconds"

    def _watch(self, connection: socket.socket, rank: int) -> None:
        """Wait until the process of this rank leaves, and end this one if it was lost."""
        connection.settimeout(None)
        self._connections.append(connection)
        with contextlib.suppress(ConnectionError):
            if connection.recv(1) == _LEFT:
                return
        if self._has_left:
            return
        self.reason = f"Process {rank} of the run has ended"
        time.sleep(_TIME_TO_END)
        if not self._has_left:
            show(f"pecobook: {lost(self.reason, self._world.rank)}")
            self._end(LostProcessError.exit_code)


def _address(world: World) -> str:
    """Return a name shared by the processes of one attempt on one machine; it is not a file, and ends with them."""
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    parts = [os.environ.get(name, "") for name in (*names, "SLURM_JOB_ID", "SLURM_STEP_ID")]
    text = repr([os.getuid(), world.launcher, world.rank - world.local_rank, *parts])
    return "\0pecobook-" + hashlib.sha256(text.encode()).hexdigest()


def _user(connection: socket.socket) -> int:
    """Return the user id of the process at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", credentials)[1])


@contextlib.contextmanager
def watched(world: World | None) -> Iterator[None]:
    """Within this context, watch the other processes that a launcher or a script has started on this machine."""
    if world is None or world.local_size == 1 or sys.platform != "linux":
        yield
        return
    siblings = Siblings.current = Siblings(world)
    in_order = False
    try:
        yield
        in_order = True
    except SystemExit:
        in_order = True
        raise
    except PecobookError as error:
        in_order = error.on_all_ranks
        raise
    finally:
        Siblings.current = None
        siblings.leave(in_order=in_order)


def known_loss() -> str:
    """Return the known problem with the other processes on this machine; empty if there is none."""
    return "" if Siblings.current is None else Siblings.current.reason
