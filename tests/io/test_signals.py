"""Handlers of the signals that end a process, and what is there before and after."""

from __future__ import annotations

import signal
import threading

import pytest

from personalize.io.signals import ending_signals_handled


@pytest.fixture
def terminated():
    """The handler of SIGTERM before the test, which is put back."""
    before = signal.getsignal(signal.SIGTERM)
    yield before
    signal.signal(signal.SIGTERM, before)


def test_the_handler_is_there_for_the_body_alone_also_if_it_raises(terminated) -> None:
    received: list[int] = []
    with pytest.raises(KeyError), ending_signals_handled(lambda number, _: received.append(number)):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        raise KeyError
    assert received == [signal.SIGTERM, signal.SIGINT] and signal.getsignal(signal.SIGTERM) == terminated


def test_what_is_ignored_or_not_to_be_replaced_stays(terminated) -> None:
    handlers = signal.SIG_IGN, lambda *_: None
    for present, replaces in zip(handlers, ({}, {"replaces": lambda before: before == signal.SIG_DFL}), strict=True):
        signal.signal(signal.SIGTERM, present)
        with ending_signals_handled(lambda *_: None, **replaces):
            assert signal.getsignal(signal.SIGTERM) == present


def test_a_handler_that_is_not_of_python_stays(monkeypatch) -> None:
    """Python says None for it, and cannot set it again."""
    changed: list[object] = []
    monkeypatch.setattr(signal, "getsignal", lambda _: None)
    monkeypatch.setattr(signal, "signal", lambda *given: changed.append(given))
    with ending_signals_handled(lambda *_: None):
        assert changed == []
    assert changed == []


def test_in_another_thread_nothing_is_set(terminated) -> None:
    seen: list[object] = []

    def work() -> None:
        with ending_signals_handled(lambda *_: None):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [terminated]
