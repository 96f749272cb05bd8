"""A few lines that no signal interrupts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["uninterrupted"]

_SIGNALS = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2),
)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within `with`, the signals that end or interrupt a program wait; they take effect at its end.

    Blocking them in this thread is not enough when there are others: the system then gives the
    signal to one of those, and Python runs its handler in the main thread all the same. So in the
    main thread the handlers are replaced as well; in any other, Python runs none.
    """
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    # Asked for by itself: the call that blocks may raise what a signal before it has left to do.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        replaced = {}
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                # One that is ignored stays so; one that is not Python's could not be put back.
                if handler not in (signal.SIG_IGN, None):
                    replaced[number] = handler
                    signal.signal(number, remember)
        try:
            yield
        finally:
            for number, handler in replaced.items():
                signal.signal(number, handler)
            for once in dict.fromkeys(came):
                signal.raise_signal(once)  # to this thread, which has it blocked until below
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
