"""Signals that end a run early."""

from __future__ import annotations

import signal
import threading

import pytest

from kecho.bench import signals

pytestmark = pytest.mark.python_only


@pytest.mark.parametrize("number", signals.ENDINGS)
def test_the_first_signal_interrupts_and_those_that_follow_at_once_do_not(
    number: signal.Signals,
) -> None:
    interrupted: list[int] = []
    before = signal.getsignal(number)
    with signals.heard(signals.ENDINGS) as ending:
        ending.interrupt = lambda: interrupted.append(1)
        for _ in range(3):
            signal.raise_signal(number)
        assert ending.number == number
        assert interrupted == [1]
        ending._at_s -= 3  # as if that were so long ago
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_a_command_that_was_ended_is_not_ended_again() -> None:
    before = signal.getsignal(signal.SIGINT)
    try:
        with signals.heard(to_the_last=True) as ending:
            ending.interrupt = lambda: None
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    with signals.heard(to_the_last=True):
        pass
    assert signal.getsignal(signal.SIGINT) is before


def test_without_a_run_to_interrupt_the_first_signal_is_raised() -> None:
    with signals.heard() as ending:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert ending.number == signal.SIGINT


def test_a_handler_of_somebody_elses_and_an_ignored_signal_are_left_alone() -> None:
    def handler(number: int, frame: object) -> None:
        pass

    before = [signal.signal(signal.SIGTERM, handler), signal.signal(signal.SIGHUP, signal.SIG_IGN)]
    try:
        with signals.heard(signals.ENDINGS):
            assert signal.getsignal(signal.SIGTERM) is handler
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])


def test_within_a_command_a_run_hears_the_commands_signals() -> None:
    with signals.heard(signals.ENDINGS) as outer, signals.heard() as inner:
        assert inner is outer


def test_another_thread_changes_no_handler() -> None:
    seen: list[object] = []
    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        with signals.heard():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert seen == [before]
