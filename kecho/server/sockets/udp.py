"""UDP sockets: one on each address and port that TCP listens on, or one for each worker there."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress
from dataclasses import dataclass

from ...errors import ListenError, naming
from ..config import ServerConfig
from .addresses import Address, describe_addresses
from .listen import (
    FREE_PORT_TRIES,
    Listener,
    open_listeners,
    why_refused,
)

__all__ = ["Datagrams", "open_everything", "udp_worker_count"]

_IP_PKTINFO = 8  # <linux/in.h>; Python has it from 3.14 on
_IP_RECVTTL = 12  # <bits/in.h>
_UDP_GRO = 104  # <linux/udp.h>, Linux 5.0
_RECEIVE_BUFFER_BYTES = 1 << 20  # net.core.rmem_max may allow less: a burst waits there
# net.core.wmem_max may allow less. The kernel doubles it, and 1,024 neighbours that are not there
# (net.ipv4.neigh.default.gc_thresh3), each with an answer that waits for it, do not fill that.
_SEND_BUFFER_BYTES = 4 << 20


@dataclass(frozen=True)
class Datagrams:
    """A bound UDP socket, and the index of the UDP worker that serves it."""

    socket: socket.socket
    worker: int

    @property
    def address(self) -> Address:
        with naming("getsockname"):
            address: Address = self.socket.getsockname()
        return address


def udp_worker_count(config: ServerConfig, worker_count: int) -> int:
    """shared: one thread for all, since several that read one socket would fight for its lock
    and answer a client's datagrams out of order; percpu: one beside each TCP worker."""
    if not config.udp:
        return 0
    return worker_count if config.dispatch == "percpu" else 1


def open_everything(
    config: ServerConfig, worker_count: int
) -> tuple[list[Listener], list[Datagrams]]:
    """open_listeners(), and the UDP sockets on the same ports. Raises ListenError; nothing is left
    open then."""
    for _ in range(FREE_PORT_TRIES):
        listeners = open_listeners(config, worker_count)
        try:
            return listeners, _open_udp(config, listeners, worker_count)
        except BaseException as error:
            for one in listeners:
                one.close()
            # A port that is free for TCP may be taken for UDP: try the next one.
            in_use = isinstance(error, ListenError) and error.errno == errno.EADDRINUSE
            if config.port != 0 or not in_use:
                raise
    raise ListenError("port", errno.EADDRINUSE, "no port is free for both TCP and UDP")


def _open_udp(
    config: ServerConfig, listeners: list[Listener], worker_count: int
) -> list[Datagrams]:
    opened: list[Datagrams] = []
    count = udp_worker_count(config, worker_count)
    if not count:
        return opened
    try:
        for family, address in dict.fromkeys(
            # Not where a socket was inherited: UDP has one port, which is never answered.
            (one.socket.family, one.address)
            for one in listeners
            if not (one.is_unix or one.inherited)
        ):
            _open_group(config, family, address, count, opened)
    except BaseException:
        for one in opened:
            one.socket.close()
        raise
    return opened


def _open_group(
    config: ServerConfig, family: int, address: Address, count: int, opened: list[Datagrams]
) -> None:
    """The sockets of one address, in the order of the workers, which is theirs in the kernel's
    SO_REUSEPORT group, too."""
    first: socket.socket | None = None
    for worker in range(count):
        one = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        opened.append(Datagrams(one, worker))
        try:
            _set_up(one, family)
            # No SO_REUSEADDR: for UDP it would share the port with anybody who has it, too. The
            # first socket shares it only once it is bound, so that a taken port is found out.
            if first is not None or config.reuse_port:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            one.bind(address)
            if first is None and count > 1:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except OSError as error:
            where = describe_addresses((address,), "udp")
            raise ListenError("port", error.errno, why_refused(where, error)) from None
        first = first or one


def _set_up(one: socket.socket, family: int) -> None:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    # The address that was asked is the one that answers; how far a datagram could still go, an
    # answer may not always exceed: ip(7), ipv6(7).
    if family == socket.AF_INET6:
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
    else:
        one.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        one.setsockopt(socket.IPPROTO_IP, _IP_RECVTTL, 1)
    with suppress(OSError):  # an older kernel gives each datagram by itself
        one.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
