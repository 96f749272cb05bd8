"""The server that is measured: where it is, and whether it echoes at all."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from dataclasses import dataclass, replace

from .workload import Workload

__all__ = ["Target", "TargetError", "find"]

_PROBE_BYTES = 32
_PROBE_TRIES = 3  # of a datagram
_UCRED = struct.Struct("iII")  # pid, uid, gid


class TargetError(OSError):
    """There is nothing to measure: nothing listens, an unknown host, no echo server. One line."""


@dataclass(frozen=True)
class Target:
    """family: AF_INET, AF_INET6 or AF_UNIX. address: packed, or a path. name: for a person.
    datagrams: by UDP. is_local: on this host, by whatever address. pid: of the server, where the
    kernel says it."""

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
        """By its address: 127.0.0.0/8 or ::1, as IPv6 or not. The kernel calls no other so."""
        if self.family == socket.AF_UNIX:
            return False
        address = ipaddress.ip_address(self.address)
        mapped = getattr(address, "ipv4_mapped", None)
        return (mapped or address).is_loopback or address.is_unspecified


def find(workload: Workload) -> Target:
    """The first of the host's addresses that echoes a message. Raises TargetError."""
    if workload.uds is not None:
        path = os.fsencode(workload.uds)
        target = Target(socket.AF_UNIX, path, 0, 0, f"unix {workload.uds}", True)
        return _probe(workload, target, workload.uds)
    try:
        kind = socket.SOCK_DGRAM if workload.udp else socket.SOCK_STREAM
        found = socket.getaddrinfo(workload.host, workload.port, type=kind)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TargetError(f"unknown host {workload.host!r}: {reason}") from None
    first_error = None
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
        try:
            return (_probe_udp if workload.udp else _probe)(workload, target, where)
        except TargetError as error:
            first_error = first_error or error
    raise first_error or TargetError(f"{workload.host!r} has no address")


def _probe(workload: Workload, target: Target, where: object) -> Target:
    """One echo, of bytes that nobody sends by accident; what the connection shows of the server."""
    message = os.urandom(_PROBE_BYTES)
    try:
        with socket.socket(target.family, socket.SOCK_STREAM) as probe:
            probe.settimeout(workload.timeout_s)
            probe.connect(where)  # type: ignore[arg-type]
            target = _with_locality(target, probe)
            probe.sendall(message)
            reply = b""
            while len(reply) < len(message) and (chunk := probe.recv(4096)):
                reply += chunk
                if not message.startswith(reply):
                    raise TargetError(
                        f"{target.name} is no echo server: it answered {_shown(reply)}"
                    )
    except OSError as error:
        raise _why_not(workload, target, error) from None
    if reply != message:
        raise TargetError(
            f"{target.name} closed the connection after {len(reply)} of {len(message)} bytes"
        )
    return target


def _with_locality(target: Target, probe: socket.socket) -> Target:
    if target.family == socket.AF_UNIX:
        # Of who called listen(2), unix(7); 0 in another PID namespace.
        credentials = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return replace(target, is_local=True, pid=_UCRED.unpack(credentials)[0] or None)
    # Towards an address of its own, a host connects from that address.
    is_own = probe.getsockname()[0] == probe.getpeername()[0]
    return replace(target, is_local=is_own or target.is_loopback)


def _probe_udp(workload: Workload, target: Target, where: object) -> Target:
    """The same by datagrams, of which some may be lost."""
    message = os.urandom(_PROBE_BYTES)
    try:
        with socket.socket(target.family, socket.SOCK_DGRAM) as probe:
            probe.settimeout(workload.timeout_s)
            probe.connect(where)  # type: ignore[arg-type]
            target = _with_locality(target, probe)
            for tries_left in reversed(range(_PROBE_TRIES)):
                probe.send(message)
                try:
                    reply = probe.recv(65536)
                    break
                except TimeoutError:
                    if not tries_left:
                        raise
    except OSError as error:
        raise _why_not(workload, target, error) from None
    if reply != message:
        raise TargetError(f"{target.name} is no echo server: it answered {_shown(reply)}")
    return target


def _why_not(workload: Workload, target: Target, error: OSError) -> TargetError:
    if isinstance(error, TargetError):
        return error
    if isinstance(error, TimeoutError):
        waited = f"within {workload.timeout_s:g} s"
        return TargetError(f"{target.name} did not echo a message {waited} (--timeout)")
    if isinstance(error, (ConnectionRefusedError, FileNotFoundError)):
        return TargetError(f"nothing listens at {target.name}: {error.strerror}")
    return TargetError(f"{target.name}: {error.strerror or error}")


def _shown(data: bytes) -> str:
    return repr(data[:40])[1:] + ("…" if len(data) > 40 else "")
