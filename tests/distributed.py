"""Two processes joined by gloo, started once in a test session, that call functions for any test."""

from __future__ import annotations

import multiprocessing.process
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from tests import forked

WORLD_SIZE = 2
_LIMIT = 120.0  # seconds
_STRAGGLER = 5.0  # seconds that a rank has after the other rank failed, before it counts as stuck in a collective


class TwoProcesses:
    """A pool of two ranks. The pool starts at the first `run`, and again after a run that hung or killed a rank."""

    def __init__(self, straggler: float = _STRAGGLER) -> None:
        self._straggler = straggler
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, limit: float = _LIMIT) -> list[Any]:
        """Call `function(rank, 2, *args)` in both processes; return the results, rank 0's first.

        The function must be at the top level of its module, and arguments and results must pickle. Each call begins
        with torch's seed 0 and `torch.distributed` initialised, and has the environment that torchrun would set. An
        error of a rank is raised here, with the rank's traceback as a note. TimeoutError after `limit` seconds.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, args)))
        answers = self._answers(limit)
        for rank in sorted(answers):
            error = answers[rank][1]
            if error is not None:
                raise error
        return [answers[rank][0] for rank in range(WORLD_SIZE)]

    def _answers(self, limit: float) -> dict[int, tuple[Any, BaseException | None]]:
        answers: dict[int, tuple[Any, BaseException | None]] = {}
        stop = time.monotonic() + limit
        while len(answers) < WORLD_SIZE:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(waiting, timeout=max(stop - time.monotonic(), 0))
            if not ready:
                self.close()
                if answers:  # one rank failed and the other rank waits for it: report the failure
                    break
                raise TimeoutError(f"The two processes did not answer in {limit:g} s.")
            for rank, pipe in enumerate(self._pipes):
                if pipe in ready:
                    try:
                        answers[rank] = pickle.loads(pipe.recv_bytes())
                    except EOFError:
                        self.close()
                        raise RuntimeError(f"Rank {rank} died.") from None
                    if answers[rank][1] is not None:
                        stop = min(stop, time.monotonic() + self._straggler)
        return answers

    def _start(self) -> None:
        context = forked.context()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, theirs), daemon=False)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def close(self) -> None:
        """End both processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []


def _serve(rank: int, port: int, pipe: Connection) -> None:
    os.environ.update(forked.torchrun_variables(rank, WORLD_SIZE, port), OMP_NUM_THREADS="1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=_LIMIT))
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:  # the tests are over
            return
        torch.manual_seed(0)
        try:
            function, args = pickle.loads(message)
            # Plain pickle, because torch's own would keep tensors in shared memory of a process that may end.
            answer = pickle.dumps((function(rank, WORLD_SIZE, *args), None))
        except BaseException as error:
            answer = pickle.dumps((None, _portable(error, rank)))
        pipe.send_bytes(answer)


def _portable(error: BaseException, rank: int) -> BaseException:
    """Return the exception, or a RuntimeError that quotes it where the exception cannot be pickled."""
    note = f"On rank {rank}:\n{traceback.format_exc()}"
    try:
        copy = pickle.loads(pickle.dumps(error))
        survives = type(copy) is type(error) and str(copy) == str(error)
    except Exception:
        survives = False
    portable = error if survives else RuntimeError(f"{type(error).__name__}: {error}")
    portable.__traceback__ = None
    portable.add_note(note)
    return portable
