"""The check that there is an echo server, by the first message of the first connection."""

from __future__ import annotations

import select
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, replace

from .crew import first_message
from .sources import bindable
from .target import Target, TargetError, addresses_of
from .workload import Workload

__all__ = ["FirstConnection", "find"]

_DATAGRAM_TRIES = 3
_CHUNK_BYTES = 65536
_UCRED = struct.Struct("iII")  # pid, uid, gid
_IP_BIND_ADDRESS_NO_PORT = 24  # ip(7)


@dataclass(frozen=True)
class FirstConnection:
    """A connection on which the first message has been echoed: the client's connection 0.

    connect_ns: how long its connect took.
    """

    socket: socket.socket
    connect_ns: int


def find(workload: Workload, seed: bytes) -> tuple[Target, FirstConnection | None]:
    """Find the first address of the host that echoes a message.

    The message is the first one of the workload. In modes that open their connections before they
    begin, the probe's connection is the first of them, so that a server that accepts only one can
    be measured. With --no-probe the first address is taken, and nothing is sent. Raises TargetError
    if no address echoes.
    """
    first_error = None
    for target, where in addresses_of(workload):
        try:
            if not workload.probe:
                return _with_locality_of(target, where), None
            if workload.udp:
                return _probe_datagrams(workload, target, where, seed), None
            return _probe_stream(workload, target, where, seed)
        except TargetError as error:
            first_error = first_error or error
    raise first_error or TargetError(f"{workload.host!r} has no address")


def _probe_stream(
    workload: Workload, target: Target, where: object, seed: bytes
) -> tuple[Target, FirstConnection | None]:
    probe = socket.socket(target.family, socket.SOCK_STREAM)
    is_kept = False
    try:
        # Urgent bytes are compared as well.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        probe.settimeout(workload.timeout_s)
        _bind_first_source(workload, target, probe)
        begun_ns = time.monotonic_ns()
        probe.connect(where)  # type: ignore[arg-type]
        connect_ns = time.monotonic_ns() - begun_ns
        target = _with_locality(target, probe)
        if target.family != socket.AF_UNIX:
            probe.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _exchange(probe, first_message(workload, seed), workload.timeout_s, target)
        is_kept = workload.mode in ("closed", "open", "stream", "idle")
    except OSError as error:
        raise _why_not(workload, target, error) from None
    finally:
        if not is_kept:
            probe.close()
    return target, FirstConnection(probe, connect_ns) if is_kept else None


def _bind_first_source(workload: Workload, target: Target, probe: socket.socket) -> None:
    first = next(iter(workload.source_addresses()), None)
    # The crew refuses a source of another family later.
    if first is not None and len(first.packed) == len(target.address):
        probe.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
        probe.bind(bindable(first))


def _exchange(probe: socket.socket, message: bytes, timeout_s: float, target: Target) -> None:
    """Send the message and compare its echo.

    It reads while it sends: a server that echoes a long message may wait for its client to read.
    """
    probe.setblocking(False)
    unsent = memoryview(message)
    came = 0
    while came < len(message):
        _wait(probe, timeout_s, to_send=bool(unsent))
        with suppress(BlockingIOError):
            unsent = unsent[probe.send(unsent[:_CHUNK_BYTES]) :] if unsent else unsent
        with suppress(BlockingIOError):
            if not (chunk := probe.recv(_CHUNK_BYTES)):
                raise TargetError(
                    f"{target.name} closed the connection after {came} of {len(message)} bytes"
                )
            if chunk != message[came : came + len(chunk)]:
                answered = _shown(chunk) + (f" after {came} right bytes" if came else "")
                raise TargetError(f"{target.name} is not an echo server: it answered {answered}")
            came += len(chunk)


def _wait(probe: socket.socket, timeout_s: float, *, to_send: bool) -> None:
    poll = select.poll()
    poll.register(probe, select.POLLIN | (select.POLLOUT if to_send else 0))
    if not poll.poll(timeout_s * 1000):
        raise TimeoutError


def _probe_datagrams(workload: Workload, target: Target, where: object, seed: bytes) -> Target:
    """Probe with datagrams, of which some may be lost, from a socket of its own."""
    message = first_message(workload, seed)
    try:
        with socket.socket(target.family, socket.SOCK_DGRAM) as probe:
            probe.settimeout(workload.timeout_s)
            probe.connect(where)  # type: ignore[arg-type]
            target = _with_locality(target, probe)
            for tries_left in reversed(range(_DATAGRAM_TRIES)):
                probe.send(message)
                try:
                    reply = probe.recv(_CHUNK_BYTES)
                    break
                except TimeoutError:
                    if not tries_left:
                        raise
    except OSError as error:
        raise _why_not(workload, target, error) from None
    if reply != message:
        raise TargetError(f"{target.name} is not an echo server: it answered {_shown(reply)}")
    return target


def _with_locality(target: Target, connected: socket.socket) -> Target:
    """Return the target with is_local and pid, as a connected socket shows them."""
    if target.family == socket.AF_UNIX:
        # The process that called listen(2): unix(7). 0 in another PID namespace.
        credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return replace(target, is_local=True, pid=_UCRED.unpack(credentials)[0] or None)
    # A connection to one of the host's own addresses comes from the same address.
    is_own = connected.getsockname()[0] == connected.getpeername()[0]
    return replace(target, is_local=is_own or target.is_loopback)


def _with_locality_of(target: Target, where: object) -> Target:
    """Return the target with is_local, without sending: a UDP connect only looks up the route."""
    with suppress(OSError):
        if target.family != socket.AF_UNIX:
            with socket.socket(target.family, socket.SOCK_DGRAM) as one:
                one.connect(where)  # type: ignore[arg-type]
                return _with_locality(target, one)
    return target


def _why_not(workload: Workload, target: Target, error: OSError) -> TargetError:
    """Return why there is no echo server, as an error of one line."""
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
