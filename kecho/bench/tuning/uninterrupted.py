"""Code that no signal interrupts."""

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
    """Delay the signals that end or interrupt a program until the end of `with`.

    Blocking them in this thread is not enough when there are other threads: the kernel then
    delivers the signal to one of those, and Python runs its handler in the main thread. So in the
    main thread the handlers are replaced as well. In other threads, Python runs no handlers.
    """
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    # A call of its own: the call that blocks may raise the exception of an earlier signal.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        replaced = {}
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                # A signal that is ignored stays so. A handler not set by Python cannot be restored.
                if handler not in (signal.SIG_IGN, None):
                    replaced[number] = handler
                    signal.signal(number, remember)
        try:
            yield
        finally:
            for number, handler in replaced.items():
                signal.signal(number, handler)
            for once in dict.fromkeys(came):
                signal.raise_signal(once)  # pending until the mask is restored below
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
