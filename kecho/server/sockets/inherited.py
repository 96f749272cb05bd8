"""--fd: listening sockets that somebody else has opened and may share: a service manager, or the
server that this one replaces."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from ...errors import ListenError
from .unix import refuse_descriptors

__all__ = ["Before", "adopt", "set_keepalive", "set_unless_mptcp"]

_PROTOCOLS = {
    socket.AF_INET: (socket.IPPROTO_TCP, socket.IPPROTO_MPTCP),
    socket.AF_INET6: (socket.IPPROTO_TCP, socket.IPPROTO_MPTCP),
    socket.AF_UNIX: (0,),
}

_SO_MEMINFO = 55  # <asm-generic/socket.h>, Linux 4.12
_SK_MEMINFO_DROPS, _SK_MEMINFO_VARS = 8, 9  # <linux/sock_diag.h>

_Setting = tuple[int, int, int | bytes]  # level, name, value

_SO_TIMESTAMPING = 37  # <asm-generic/socket.h>
_IP_RECVERR, _IPV6_RECVERR = 11, 25  # <linux/in.h>, <linux/in6.h>

# Whatever its holder wanted of them, accepted sockets inherit these, and an echo needs them so.
# Lingering would reset a client that is still reading, or block close(2); with a low-water mark or
# a cork, short messages wait; stamps of what is sent, and errors of the network, fill an error
# queue that shares the receive buffer, and which nobody reads.
_FOR_ECHOES: Sequence[_Setting] = (
    (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0)),
    (socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1),
    (socket.SOL_SOCKET, _SO_TIMESTAMPING, 0),
    (socket.IPPROTO_TCP, socket.TCP_CORK, 0),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.IPPROTO_TCP, socket.TCP_LINGER2, 0),
    (socket.IPPROTO_IP, _IP_RECVERR, 0),
)
_FOR_ECHOES_V6: Sequence[_Setting] = ((socket.IPPROTO_IPV6, _IPV6_RECVERR, 0),)
_PROBES = 5
_ABSENT = (errno.ENOPROTOOPT, errno.EOPNOTSUPP)  # MPTCP has not all of them


@dataclass(frozen=True)
class Before:
    """What an inherited TCP listener was like when it was taken over."""

    backlog: int
    dropped: int  # SYNs

    @classmethod
    def of(cls, one: socket.socket) -> Before | None:
        """None: of a Unix socket, which tells neither."""
        if one.family == socket.AF_UNIX:
            return None
        info = memory = b""
        # For a listener tcpi_sacked stands for the backlog: tcp_get_info() in net/ipv4/tcp.c.
        with suppress(OSError):  # MPTCP, before it could be asked
            info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        with suppress(OSError):  # before Linux 4.12 there is none, and the engine counts no drops
            memory = one.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 4 * _SK_MEMINFO_VARS)
        return cls(
            struct.unpack_from("=8x6I", info)[5] if len(info) >= 32 else socket.SOMAXCONN,
            struct.unpack(f"={_SK_MEMINFO_VARS}I", memory)[_SK_MEMINFO_DROPS]
            if len(memory) == 4 * _SK_MEMINFO_VARS
            else 0,
        )


def adopt(
    fds: Sequence[int],
    adopted: list[socket.socket],
    keepalive_s: int,
) -> None:
    """Appends a duplicate of each, which listens and does not block. Raises ListenError.

    The caller's descriptors stay the caller's: closing the duplicate ends nothing for whoever
    else has the socket. Not so what is set here. Options and O_NONBLOCK belong to the socket and
    its open file description, which all its holders share; there is no way to a description of
    one's own (open(2) of /proc/self/fd/N gives ENXIO for a socket). Without O_NONBLOCK, a worker
    would hang in accept4() whenever another holder had been faster.
    """
    for fd in fds:
        _check_open(fd)  # all of them first, or a duplicate could get the number of another one
    for fd in fds:
        adopted.append(_duplicate(fd))
        one = adopted[-1]
        try:
            _check(fd, one)
            one.setblocking(False)
            if one.family == socket.AF_UNIX:
                refuse_descriptors(one)
            else:
                _set_for_echoes(one)
                set_unless_mptcp(one)
                set_keepalive(one, keepalive_s)
        except OSError as error:
            if isinstance(error, ListenError):
                raise
            raise ListenError("fd", error.errno, f"descriptor {fd}: {error.strerror}") from None


def _set_for_echoes(one: socket.socket) -> None:
    _set_those_there_are(one, _FOR_ECHOES)
    if one.family == socket.AF_INET6:
        _set_those_there_are(one, _FOR_ECHOES_V6)


def _set_those_there_are(one: socket.socket, options: Sequence[_Setting]) -> None:
    for level, name, value in options:
        try:
            one.setsockopt(level, name, value)
        except OSError as error:
            if error.errno not in _ABSENT:
                raise


def set_keepalive(one: socket.socket, idle_s: int) -> None:
    """For connections that are accepted from it: tcp(7). 0: it is left as it is."""
    if idle_s:
        interval_s = max(1, idle_s // _PROBES)
        options = (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_s),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval_s),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES),
        )
        _set_those_there_are(one, options)


def set_unless_mptcp(one: socket.socket) -> None:
    """MPTCP has neither option, nor urgent data: mptcp_setsockopt() in net/mptcp/sockopt.c.

    The server before this one may have set TCP_USER_TIMEOUT. It also ends connections of clients
    that read: from the first probe of a window that is shut, time runs on until the window has room
    for the whole of the next segment, however much is sent in between: tcp_probe_timer() and
    tcp_ack_probe() in net/ipv4 (tried on Linux 6.18). So write_timeout is the engine's own.
    """
    if one.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL) == socket.IPPROTO_MPTCP:
        return
    one.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)


def _check_open(fd: int) -> None:
    try:
        os.fstat(fd)
    except OSError as error:
        raise ListenError("fd", error.errno, f"descriptor {fd} is not open") from None


def _duplicate(fd: int) -> socket.socket:
    duplicate = -1
    try:
        duplicate = os.dup(fd)
        return socket.socket(fileno=duplicate)
    except OSError as error:
        if duplicate >= 0:
            os.close(duplicate)
        not_one = error.errno == errno.ENOTSOCK
        reason = f"descriptor {fd}{' is not a socket' if not_one else f': {error.strerror}'}"
        raise ListenError("fd", error.errno, reason) from None


def _check(fd: int, one: socket.socket) -> None:
    protocol = one.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL)
    if one.type != socket.SOCK_STREAM or protocol not in _PROTOCOLS.get(one.family, ()):
        reason = f"descriptor {fd} is neither a TCP nor a Unix stream socket"
        raise ListenError("fd", errno.EPROTONOSUPPORT, reason)
    if not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise ListenError("fd", errno.EINVAL, f"descriptor {fd} does not listen")
