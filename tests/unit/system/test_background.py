"""Work in threads beside the main one."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from kecho.system import background

pytestmark = pytest.mark.python_only


def test_a_call_gives_what_the_function_gives_or_raises() -> None:
    assert background.call(lambda: threading.current_thread() is threading.main_thread()) is False
    with pytest.raises(LookupError, match="here"):
        background.call(lambda: (_ for _ in ()).throw(LookupError("here")))


def test_a_signal_does_not_wait_for_a_call() -> None:
    ending = threading.Event()

    def handle(number: int, frame: object) -> None:
        raise InterruptedError

    def work() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)  # its handler runs in the main thread
        ending.wait(30)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        with pytest.raises(InterruptedError):
            background.call(work)
    finally:
        signal.signal(signal.SIGUSR1, before)
        ending.set()


def test_a_call_is_made_without_a_thread_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert background.call(lambda: 5) == 5
    with pytest.raises(OSError, match="a thread cannot be started"):
        background.start(threading.Thread())
