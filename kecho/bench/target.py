"""The address of the server that is measured."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from ..options import uds_address
from ..system import background
from .workload import Workload

__all__ = ["Target", "TargetError", "addresses_of"]


class TargetError(OSError):
    """There is no echo server to measure. The text says why, in one line."""


@dataclass(frozen=True)
class Target:
    """One address of a server.

    family: AF_INET, AF_INET6 or AF_UNIX.
    address: packed; of a Unix socket as bind(2) takes it.
    scope: the index of a link-local address's device; otherwise 0.
    name: for people.
    is_local: the server is on this host, whatever its address.
    datagrams: UDP.
    pid: of the server, if the kernel says it.
    """

    family: int
    address: bytes
    port: int
    scope: int
    name: str
    is_local: bool
    datagrams: bool = False
    pid: int | None = None

    @property
    def is_loopback(self) -> bool:
        """Whether the address is a loopback one: 127.0.0.0/8, also v4-mapped, or ::1."""
        if self.family == socket.AF_UNIX:
            return False
        address = ipaddress.ip_address(self.address)
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_loopback or address.is_unspecified


def addresses_of(workload: Workload) -> Iterator[tuple[Target, object]]:
    """Yield the addresses of the server, each with what connect(2) takes.

    Raises TargetError if the host is unknown.
    """
    if workload.uds is not None:
        path = uds_address(workload.uds)
        yield Target(socket.AF_UNIX, path, 0, 0, f"unix {workload.uds}", True), path
        return
    try:
        kind = socket.SOCK_DGRAM if workload.udp else socket.SOCK_STREAM
        found = background.call(lambda: socket.getaddrinfo(workload.host, workload.port, type=kind))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TargetError(f"unknown host {workload.host!r}: {reason}") from None
    for family, _, _, _, where in found:
        address = str(where[0]).partition("%")[0]
        shown = f"[{where[0]}]" if family == socket.AF_INET6 else str(where[0])
        target = Target(
            family,
            socket.inet_pton(family, address),
            workload.port,
            int(where[3]) if len(where) == 4 else 0,
            f"{'udp' if workload.udp else 'tcp'} {shown}:{workload.port}",
            False,
            workload.udp,
        )
        yield target, where
