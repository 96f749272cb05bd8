"""Work in threads beside the main one, which hears signals meanwhile."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

__all__ = ["call", "start"]

T = TypeVar("T")


def start(thread: threading.Thread) -> None:
    """OSError, with a reason of one line, where the system has no more threads to give."""
    try:
        thread.start()
    except RuntimeError:  # what Python makes of pthread_create(3)'s EAGAIN
        raise OSError(
            errno.EAGAIN,
            "a thread cannot be started: a limit on processes or memory is reached (ulimit -u, "
            "ulimit -v, pids.max of the cgroup)",
        ) from None


def call(function: Callable[[], T]) -> T:
    """function(), of which a signal's handler need not await the end: getaddrinfo(3) may take long.

    The thread that an exception has left behind goes on until it has ended; its result is lost.
    Where there is no thread to be had, or this is not the main one, it is called here.
    """
    if threading.current_thread() is not threading.main_thread():
        return function()
    results: list[T] = []
    errors: list[BaseException] = []
    has_ended = threading.Event()

    def work() -> None:
        # The main thread is to get them, or it would not wake up.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)
        finally:
            has_ended.set()

    thread = threading.Thread(target=work, daemon=True)
    with suppress(OSError):
        start(thread)
        has_ended.wait()
        thread.join()
    if errors:
        raise errors[0]
    return results[0] if results else function()
