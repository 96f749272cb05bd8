"""Listening sockets: one for each worker that wants its own."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections import Counter
from dataclasses import dataclass

from ...errors import ListenError, naming
from ...system import sysctl
from ..config import ServerConfig
from .addresses import Address, Target, resolve
from .inherited import Before, adopt, set_keepalive, set_unless_mptcp
from .memory import limit_memory
from .unix import SocketFile, listen_unix, takes_descriptors

__all__ = ["FREE_PORT_TRIES", "Listener", "open_listeners", "why_refused"]

EVERY_QUEUE = -1
FREE_PORT_TRIES = 16
_ADDRESS_ERRORS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL)

log = logging.getLogger("kecho")


@dataclass(frozen=True)
class Listener:
    """A listening socket, non-blocking.

    queue: index of the worker that accepts from it, or EVERY_QUEUE.
    file: the file to remove in the end, of a Unix socket.
    inherited: it was listening before, and others may have it, too; before: what it was like.
    """

    socket: socket.socket
    queue: int
    file: SocketFile | None = None
    inherited: bool = False
    before: Before | None = None

    @property
    def is_unix(self) -> bool:
        return self.socket.family == socket.AF_UNIX

    @property
    def address(self) -> Address:
        with naming("getsockname"):
            address: Address | bytes = self.socket.getsockname()
        if isinstance(address, bytes):  # abstract: a NUL, and any bytes
            return "@" + os.fsdecode(address[1:])
        return address

    def backlog(self, config: ServerConfig) -> int | None:
        """In force; None: not known, of an inherited Unix socket."""
        if self.before is not None:
            return self.before.backlog
        return None if self.inherited else sysctl.backlog_in_force(config.backlog)

    def close(self) -> None:
        self.socket.close()
        if self.file is not None:
            self.file.remove()


def open_listeners(config: ServerConfig, worker_count: int) -> list[Listener]:
    """Opens every socket that `config` asks for. Raises ListenError; none is left open then.

    Under percpu, the `worker_count` sockets of one address stand in the list in the order of
    the workers, which is their order in the kernel's SO_REUSEPORT group.
    """
    opened: list[Listener] = []
    try:
        if config.fd:  # before any of our own could get such a number
            _adopt(config, worker_count, opened)
        if config.uds is not None:
            one, file = listen_unix(
                config.uds, config.backlog, mode=config.uds_mode, owner=config.uds_owner
            )
            opened.append(Listener(one, EVERY_QUEUE, file))
        if config.host:
            _open_tcp(config, worker_count, opened)
    except BaseException:
        for listener in opened:
            listener.close()
        raise
    if any(one.is_unix and takes_descriptors(one.socket) for one in opened):
        log.info(
            "clients of the Unix socket can pass descriptors, which kernels before Linux 6.16 do "
            "not refuse; one that takes long to close holds a thread up: let nobody else connect "
            "(--uds-mode 600)"
        )
    return opened


def _adopt(config: ServerConfig, worker_count: int, opened: list[Listener]) -> None:
    """Inherited sockets. Those of one address are dealt out if there is one for each worker, as
    in a SO_REUSEPORT group; otherwise every worker accepts from each."""
    adopted: list[socket.socket] = []
    try:
        adopt(config.fd, adopted, config.keepalive_s)
        for one in adopted:
            limit_memory(one, config)
        addresses = [one.getsockname() for one in adopted]
        befores = [Before.of(one) for one in adopted]
    except BaseException:
        for one in adopted:
            one.close()
        raise
    dealt: Counter[object] = Counter()
    for one, address, before in zip(adopted, addresses, befores, strict=True):
        enough = addresses.count(address) >= worker_count
        queue = dealt[address] % worker_count if enough else EVERY_QUEUE
        dealt[address] += 1
        opened.append(Listener(one, queue, inherited=True, before=before))


# ---- TCP ------------------------------------------------------------------------------------


def _open_tcp(config: ServerConfig, worker_count: int, opened: list[Listener]) -> None:
    targets = resolve(config.host, config.port)
    for _ in range(FREE_PORT_TRIES):
        attempt: list[Listener] = []
        try:
            _listen_everywhere(config, targets, worker_count, attempt)
        except BaseException as error:
            for listener in attempt:
                listener.close()
            # A port that is free on one address may be taken on another: try the next one.
            if config.port == 0 and attempt and _is_in_use(error):
                continue
            raise
        opened.extend(attempt)
        return
    raise ListenError("port", errno.EADDRINUSE, "no port is free on all of the addresses")


def _is_in_use(error: BaseException) -> bool:
    return isinstance(error, ListenError) and error.errno == errno.EADDRINUSE


def _listen_everywhere(
    config: ServerConfig,
    targets: dict[Target, list[str]],
    worker_count: int,
    opened: list[Listener],
) -> None:
    port = config.port
    # A name may stand for addresses that this host does not have (::1 without IPv6, say): one
    # of them is enough.
    served: set[str] = set()
    absent: dict[str, ListenError] = {}
    refused: dict[Target, ListenError] = {}
    for target, hosts in targets.items():
        try:
            _listen_tcp(config, target.with_port(port), worker_count, opened)
        except ListenError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
            absent |= {host: error for host in hosts if host not in absent}
            refused[target] = error
            continue
        served.update(hosts)
        port = int(opened[-1].address[1])
    for host, refusal in absent.items():
        if host not in served:
            raise refusal
    for target, refusal in refused.items():
        # That localhost is ::1, too, is no news where there is no IPv6.
        level = logging.INFO if target.is_loopback else logging.WARNING
        log.log(level, "host: %s: %s; left out", ", ".join(targets[target]), refusal.reason)


def _listen_tcp(
    config: ServerConfig, target: Target, worker_count: int, opened: list[Listener]
) -> None:
    sockets: list[socket.socket] = []
    try:
        if config.dispatch == "shared":
            _bind_tcp(config, target, config.reuse_port, sockets)
        else:
            # The first one is bound without SO_REUSEPORT, so that a port which another server
            # holds is found to be in use instead of being shared with it.
            _bind_tcp(config, target, config.reuse_port, sockets)
            sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound = target.with_port(sockets[0].getsockname()[1])
            for _ in range(1, worker_count):
                _bind_tcp(config, bound, True, sockets)
        for one in sockets:
            one.listen(config.backlog)
    except OSError as error:
        for one in sockets:
            one.close()
        option = "host" if error.errno in _ADDRESS_ERRORS else "port"
        raise ListenError(option, error.errno, why_refused(str(target), error)) from None
    opened.extend(Listener(one, queue) for queue, one in enumerate(sockets))


def _bind_tcp(
    config: ServerConfig, target: Target, reuse_port: bool, sockets: list[socket.socket]
) -> None:
    one = socket.socket(target.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    sockets.append(one)
    # Accepted sockets inherit the options below. TCP_NODELAY: an echo must not wait for the
    # acknowledgement of the one before. SO_OOBINLINE: an urgent byte is a byte of the stream.
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    set_unless_mptcp(one)
    set_keepalive(one, config.keepalive_s)
    limit_memory(one, config)
    if reuse_port:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if target.family == socket.AF_INET6:
        # So that 0.0.0.0 and :: can be served side by side: ipv6(7).
        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    one.bind(target.sockaddr)


def why_refused(where: str, error: OSError) -> str:
    """For a person: `where` is an address and port."""
    if error.errno == errno.EADDRINUSE:
        return f"{where} is in use by another socket"
    if error.errno == errno.EACCES:
        return (
            f"no permission to listen on {where}; ports below "
            "net.ipv4.ip_unprivileged_port_start need CAP_NET_BIND_SERVICE"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{where} is not an address of this host"
    return f"cannot listen on {where}: {error.strerror}"
