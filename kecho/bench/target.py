"""The server that is measured: where it is, and whether it echoes at all."""

from __future__ import annotations

import ipaddress
import os
import socket
from dataclasses import dataclass

from .workload import Workload

__all__ = ["Target", "TargetError", "find"]

_PROBE_BYTES = 32
_PROBE_TRIES = 3  # of a datagram


class TargetError(OSError):
    """There is nothing to measure: nothing listens, an unknown host, no echo server. One line."""


@dataclass(frozen=True)
class Target:
    """family: AF_INET, AF_INET6 or AF_UNIX. address: packed, or a path. name: for a person.
    datagrams: by UDP."""

    family: int
    address: bytes
    port: int
    scope: int
    name: str
    is_local: bool
    datagrams: bool = False


def find(workload: Workload) -> Target:
    """The first of the host's addresses that echoes a message. Raises TargetError."""
    if workload.uds is not None:
        path = os.fsencode(workload.uds)
        target = Target(socket.AF_UNIX, path, 0, 0, f"unix {workload.uds}", True)
        _probe(workload, target, workload.uds)
        return target
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
            ipaddress.ip_address(address).is_loopback,
            workload.udp,
        )
        try:
            (_probe_udp if workload.udp else _probe)(workload, target, where)
        except TargetError as error:
            first_error = first_error or error
            continue
        return target
    raise first_error or TargetError(f"{workload.host!r} has no address")


def _probe(workload: Workload, target: Target, where: object) -> None:
    """One echo, of bytes that nobody sends by accident."""
    message = os.urandom(_PROBE_BYTES)
    try:
        with socket.socket(target.family, socket.SOCK_STREAM) as probe:
            probe.settimeout(workload.timeout_s)
            probe.connect(where)  # type: ignore[arg-type]
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


def _probe_udp(workload: Workload, target: Target, where: object) -> None:
    """The same by datagrams, of which some may be lost."""
    message = os.urandom(_PROBE_BYTES)
    try:
        with socket.socket(target.family, socket.SOCK_DGRAM) as probe:
            probe.settimeout(workload.timeout_s)
            probe.connect(where)  # type: ignore[arg-type]
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
