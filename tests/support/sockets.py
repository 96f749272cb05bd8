"""The sockets of a server in this process, and clients that fill them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import kecho
from support.clients import plenty


@contextmanager
def served_sockets(server: kecho.Server) -> Iterator[list[socket.socket]]:
    """Duplicates of the server's connections: it is in this process."""
    with ExitStack() as stack:
        found = []
        # All first: a duplicate may get the number of the descriptor that listed them.
        fds = [name for name in os.listdir("/proc/self/fd") if _is_socket(name)]
        for name in fds:
            one = stack.enter_context(socket.socket(fileno=os.dup(int(name))))
            if one.family == socket.AF_INET and one.getsockname()[1] == server.port:
                with suppress(OSError):  # it listens
                    one.getpeername()
                    found.append(one)
        yield found


def _is_socket(name: str) -> bool:
    return Path("/proc/self/fd", name).is_socket()


def write_and_never_read(clients: Sequence[socket.socket], quiet_s: float = 0.5) -> None:
    """Until none has taken anything for so long."""
    for client in clients:
        client.setblocking(False)
    data = plenty()
    last = time.monotonic()
    while time.monotonic() - last < quiet_s:
        for client in clients:
            with suppress(BlockingIOError):
                client.send(data)
                last = time.monotonic()
        time.sleep(0.001)
