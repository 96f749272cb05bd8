"""--socket-memory: what the kernel may hold for a TCP connection, received and to be sent.

The kernel sizes both buffers by what moves (tcp(7)), up to tcp_rmem[2] and tcp_wmem[2], 10 to 36 MB
together: a client that writes and never reads has it hold all of that. Only SO_RCVBUF and
SO_SNDBUF bound it, and end the sizing. (TCP_WINDOW_CLAMP does not: on Linux 6.18 the sizing moves
the clamp along; nor does TCP_NOTSENT_LOWAT what a client does not acknowledge.) A connection has
them from its listener, at no cost of its own.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ...system import sysctl
from ...system.cgroups import cgroup_memory_limit
from ..config import SOCKET_MEMORY_LEAST, ServerConfig

__all__ = ["budget_of", "limit_memory", "memory_in_force"]

_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33  # <asm-generic/socket.h>; with CAP_NET_ADMIN
_BUFFERS = (
    (socket.SO_RCVBUF, _SO_RCVBUFFORCE, "rmem"),
    (socket.SO_SNDBUF, _SO_SNDBUFFORCE, "wmem"),
)
_SHARE = 2  # of a cgroup's memory: a quarter is for buffers of the process, and the process itself
_GRAIN = 1 << 10

log = logging.getLogger("kecho")


def budget_of(config: ServerConfig) -> int | None:
    """Bytes for each connection: the option socket_memory, or what stands for it. None: the kernel
    sizes the buffers.

    Where both the memory and the number of connections are limited, each connection has an equal
    share, unless that is more than the kernel would take anyway.
    """
    if config.socket_memory is not None or config.max_connections is None:
        return config.socket_memory
    limit = cgroup_memory_limit(Path("/proc/self"))
    if limit is None:
        return None
    share = limit // _SHARE // config.max_connections
    if share >= _kernels_most():
        return None
    return max(SOCKET_MEMORY_LEAST, share - share % _GRAIN)


def _kernels_most() -> int:
    """How far the kernel sizes both buffers; 0 if it does not tell."""
    found = 0
    with suppress(OSError, ValueError, IndexError):
        for _, _, name in _BUFFERS:
            found += int(sysctl.read_sysctl_text(f"net.ipv4.tcp_{name}").split()[2])
    return found


def limit_memory(one: socket.socket, config: ServerConfig) -> None:
    """Of each connection that this listener accepts from now on. Raises OSError.

    Of a Unix socket nothing is inherited, nor does the kernel size anything: it holds
    net.core.wmem_default for each side.
    """
    budget = budget_of(config)
    if budget is None or one.family == socket.AF_UNIX:
        return
    for name, force_name, _ in _BUFFERS:
        # The kernel doubles the figure, for what holds the bytes: socket(7).
        half = budget // len(_BUFFERS) // 2
        try:
            one.setsockopt(socket.SOL_SOCKET, force_name, half)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOPROTOOPT, errno.EOPNOTSUPP):
                raise
            one.setsockopt(socket.SOL_SOCKET, name, half)  # net.core.[rw]mem_max at most


def memory_in_force(config: ServerConfig, listeners: Iterable[socket.socket]) -> int | None:
    """What limit_memory() has come to, for each connection; None: the kernel sizes the buffers, or
    there is no TCP. Warns where the kernel gives less than the option asks for."""
    budget = budget_of(config)
    tcp = [one for one in listeners if one.family != socket.AF_UNIX]
    if budget is None or not tcp:
        return None
    sizes = [min(one.getsockopt(socket.SOL_SOCKET, name) for one in tcp) for name, _, _ in _BUFFERS]
    if config.socket_memory is not None and sum(sizes) < budget // 4 * 4:
        needed = " ".join(f"net.core.{name}_max={budget // 4}" for _, _, name in _BUFFERS)
        log.warning(
            "socket-memory: the kernel gives %d of %d bytes; to have all of it: CAP_NET_ADMIN, or "
            "sysctl -w %s",
            sum(sizes),
            budget,
            needed,
        )
    return sum(sizes)
