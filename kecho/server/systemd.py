"""What a service manager hands over and wants to be told: sd_listen_fds(3), sd_notify(3).

Only the command takes part, and what it finds in the environment it removes: it is meant for this
process, and not for those that it starts.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import MutableMapping
from contextlib import suppress

__all__ = ["Notifier", "take_listen_fds"]

_FIRST_FD = 3
_SEND_TIMEOUT_S = 1  # the manager reads; if it hangs, clients shall not wait for it
_FDS_MOST = 65535


def take_listen_fds(environment: MutableMapping[str, str]) -> tuple[int, ...]:
    """The descriptors of LISTEN_FDS, if LISTEN_PID is this process. Raises ValueError."""
    pid = environment.pop("LISTEN_PID", "")
    count = environment.pop("LISTEN_FDS", "")
    for name in ("LISTEN_FDNAMES", "LISTEN_PIDFDID"):
        environment.pop(name, None)
    if pid != str(os.getpid()):
        return ()
    if not (count.isascii() and count.isdigit()) or len(count) > 5 or int(count) > _FDS_MOST:
        raise ValueError(f"must be a number of descriptors (got {count!r})")
    fds = tuple(range(_FIRST_FD, _FIRST_FD + int(count)))
    for fd in fds:
        with suppress(OSError):  # one that is not open is told of when it is to listen
            os.set_inheritable(fd, False)
    return fds


class Notifier:
    """Tells the service manager how the server is. Without one, everything here does nothing."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        """Raises OSError if the manager that the environment names cannot be reached."""
        self._socket: socket.socket | None = None
        address = environment.pop("NOTIFY_SOCKET", "")
        self.watchdog_interval_s = _watchdog_interval_s(environment) if address else None
        if not address:
            return
        if address[0] not in "/@":
            raise OSError(None, f"NOTIFY_SOCKET: {address!r} is neither a path nor abstract")
        # Connected now: within the sandbox nothing can be.
        one = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            timeout = struct.pack("ll", _SEND_TIMEOUT_S, 0)  # a struct timeval
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
            one.connect("\0" + address[1:] if address[0] == "@" else address)
        except OSError as error:
            one.close()
            raise OSError(error.errno, f"NOTIFY_SOCKET: {address}: {error.strerror}") from None
        self._socket = one

    def ready(self) -> None:
        self._tell("READY=1")

    def stopping(self) -> None:
        self._tell("STOPPING=1")

    def alive(self) -> None:
        """Due every watchdog_interval_s, if that is not None."""
        self._tell("WATCHDOG=1")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _tell(self, text: str) -> None:
        if self._socket is not None:
            # One that has gone away, or does not read, is no reason to stop serving.
            with suppress(OSError):
                self._socket.send(text.encode())


def _watchdog_interval_s(environment: MutableMapping[str, str]) -> float | None:
    """Half the time within which the manager wants to hear something; None: it does not."""
    microseconds = environment.pop("WATCHDOG_USEC", "")
    pid = environment.pop("WATCHDOG_PID", "") or str(os.getpid())
    if not (microseconds.isascii() and microseconds.isdigit()) or len(microseconds) > 18:
        return None
    if pid != str(os.getpid()) or int(microseconds) == 0:
        return None
    return int(microseconds) / 2 / 1e6
