"""Host names to addresses: getaddrinfo(3)."""

from __future__ import annotations

import socket
import threading
from typing import Any

from . import background

__all__ = ["give_up", "go_on", "look_up"]

Found = list[tuple[int, int, int, str, Any]]

# Changed and read by the main thread alone.
_is_waiting = False
_reason: BaseException | None = None


def give_up(reason: BaseException) -> None:
    """For a signal handler: raises this where the main thread waits for a name, now or later,
    until go_on()."""
    global _reason
    _reason = reason
    if _is_waiting:
        raise reason


def go_on() -> None:
    global _reason
    _reason = None


def look_up(host: str, port: int, flags: int = 0) -> Found:
    """The stream addresses of a name or of a numeric address; flags: socket.AI_*.

    In the main thread signal handlers run meanwhile, and what one raises ends the wait; C's own
    resolver would go on until its servers have timed out: resolv.conf(5). Raises OSError
    (socket.gaierror), and UnicodeError for what is no name.
    """

    def ask(more_flags: int = 0) -> Found:
        return [*socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags | more_flags)]

    try:
        return ask(socket.AI_NUMERICHOST)  # asks nobody
    except socket.gaierror:
        pass
    if threading.current_thread() is not threading.main_thread():
        return ask()
    global _is_waiting
    _is_waiting = True
    try:
        if _reason is not None:
            raise _reason
        return background.call(ask)
    finally:
        _is_waiting = False
