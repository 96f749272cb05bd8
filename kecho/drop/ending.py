"""The signals that ask to end, heard only where nothing is lost by it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Ending"]


def _is_ours(number: signal.Signals) -> bool:
    """Nobody else handles it, nor ignores it on purpose: nohup(1) ignores SIGHUP, a shell the
    SIGINT of what it runs in the background. SIGTERM always means it."""
    defaults = [signal.SIG_DFL, signal.default_int_handler]
    if number == signal.SIGTERM:
        defaults.append(signal.SIG_IGN)
    return signal.getsignal(number) in defaults


class Ending:
    """number: of the first signal that came, or None. count: how many have come. stop: called for
    each, in the main thread."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.count = 0
        self.stop: Callable[[], object] = lambda: None
        self._raises_from: float = 1

    @contextmanager
    def heard(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP come here within `with`, also as process 1 of a container,
        for which the kernel has no defaults: pid_namespaces(7)."""
        in_main = threading.current_thread() is threading.main_thread()
        endings = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {one: signal.getsignal(one) for one in endings if in_main and _is_ours(one)}
        try:
            for number in before:
                signal.signal(number, self._handle)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        self.count += 1
        self.stop()
        if self.count >= self._raises_from:
            raise KeyboardInterrupt

    @contextmanager
    def raises_from(self, count: float) -> Iterator[None]:
        """Within `with`, the signal of this number, and any later one, raises KeyboardInterrupt;
        otherwise the first does."""
        before, self._raises_from = self._raises_from, count
        try:
            yield
        finally:
            self._raises_from = before
