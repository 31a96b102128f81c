from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from pecobook.engine.signals import Signals, from_the_start, stop_requested

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", _STOP)
def test_signals__records_and_restores_the_handlers(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in _STOP]
    with Signals() as signals:
        seen = [signals.received, stop_requested()]
        send(number)
        assert [*seen, signals.received, stop_requested()] == [False, False, True, True]
    assert [signal.getsignal(each) for each in _STOP] == before
    assert not stop_requested()


def test_signals__only_a_further_sigint_stops_at_once() -> None:
    """torchrun passes a signal on that its processes have had from Slurm already."""
    with Signals():
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            send(number)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_signals__a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            send(signal.SIGHUP)
            assert not signals.received
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signals__an_inner_context_keeps_what_the_outer_one_recorded() -> None:
    with Signals() as outer:
        send(signal.SIGTERM)
        with Signals() as inner:
            assert inner is outer
        send(signal.SIGTERM)  # still handled
        assert outer.received


@pytest.fixture
def _handlers() -> Iterator[None]:
    before = [signal.getsignal(each) for each in _STOP]
    yield
    for number, handler in zip(_STOP, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
def test_from_the_start__records_only_where_several_processes_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before, interrupt = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with from_the_start():
        assert signal.getsignal(signal.SIGTERM) == before
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with from_the_start(until_exit=True):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == interrupt
