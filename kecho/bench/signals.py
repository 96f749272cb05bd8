"""Signals that end a run early and keep what has been measured.

Further signals are ignored for a while: a second keystroke, or the same signal sent to the process
and to its group, would lose the result.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

__all__ = ["ENDINGS", "Ending", "heard"]

ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_GRACE_S = 2.0
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Ending:
    """Handles the signals that end a run.

    number: of the first signal that came, or None.
    interrupt: called for the first signal. While it is None, KeyboardInterrupt is raised instead,
        and so it is for a signal that comes more than _GRACE_S later.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.interrupt: Callable[[], None] | None = None
        self._at_s = 0.0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: signal.signal() takes this method."""
        if self.number is not None and time.monotonic() - self._at_s < _GRACE_S:
            return
        is_first = self.number is None
        if is_first:
            self.number, self._at_s = number, time.monotonic()
        if not is_first or self.interrupt is None:
            raise KeyboardInterrupt
        self.interrupt()


_current: Ending | None = None


@contextmanager
def heard(
    numbers: Sequence[signal.Signals] = (signal.SIGINT,), *, to_the_last: bool = False
) -> Iterator[Ending]:
    """Handle these signals within `with`. An inner `with` changes nothing.

    to_the_last: for a command. After a signal, further ones are ignored until the process exits
        with that signal's status. Blocked signals are unblocked, and SIGTERM is handled even if it
        was ignored: a parent may have left the process in that state, and then only SIGKILL could
        end it.

    Nothing is changed in threads other than the main one, or for a signal that is handled or
    ignored already: nohup(1) ignores SIGHUP, a shell ignores SIGINT for its background jobs.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield Ending()
        return
    if _current is not None:
        yield _current
        return
    ending = Ending()
    before = {number: signal.getsignal(number) for number in numbers}
    taken = {number: handler for number, handler in before.items() if handler in _DEFAULTS}
    if to_the_last and before.get(signal.SIGTERM) is signal.SIG_IGN:
        taken[signal.SIGTERM] = signal.SIG_DFL
    _current = ending
    try:
        for number in taken:
            signal.signal(number, ending.handle)
        if to_the_last:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        yield ending
    finally:
        is_exiting = to_the_last and ending.number is not None
        for number, handler in taken.items():
            signal.signal(number, signal.SIG_IGN if is_exiting else handler)
        _current = None
