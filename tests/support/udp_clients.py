"""UDP clients for tests: a deadline on every step, bursts by UDP_SEGMENT, forged packets."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import kecho
from kecho import UdpCounters
from support.clients import DEADLINE_S, wait_for

UDP_SEGMENT = 103  # <linux/udp.h>


def all_accounted_for(udp: UdpCounters) -> bool:
    lost = udp.errors.total - udp.errors["recv"]
    return udp.received == udp.sent + udp.refused.total + lost


def counted(server: kecho.Server) -> UdpCounters:
    """What it has counted once nothing is under way: a reply may come before it is counted."""
    found: list[UdpCounters] = []

    def look() -> bool:
        udp = server.stats().udp
        assert udp is not None
        found[:] = [udp]
        return all_accounted_for(udp)

    wait_for(look, "what was received is answered, refused or lost")
    return found[0]


@contextlib.contextmanager
def client(
    family: int = socket.AF_INET, source: str = "", port: int = 0
) -> Iterator[socket.socket]:
    """A socket with room for a burst of replies, bound to `source` and `port`."""
    with socket.socket(family, socket.SOCK_DGRAM) as one:
        one.settimeout(DEADLINE_S)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        if source or port:
            one.bind((source, port))
        yield one


def send_segments(one: socket.socket, data: bytes, size: int, to: tuple[str, int]) -> None:
    """One send, that the kernel cuts into datagrams of `size` bytes: udp(7), Linux 4.18."""
    one.sendmsg([data], [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("H", size))], 0, to)


def receive_all(one: socket.socket, count: int) -> list[bytes]:
    return [one.recv(65536) for _ in range(count)]


def receive_waiting(one: socket.socket, least: int = 0, quiet_s: float = 0.3) -> list[bytes]:
    """What comes until nothing has come for so long. least: as many are waited for."""
    found = []
    with contextlib.suppress(TimeoutError):
        while True:
            one.settimeout(DEADLINE_S if len(found) < least else quiet_s)
            found.append(one.recv(65536))
    one.settimeout(DEADLINE_S)
    return found


def forged(source: tuple[str, int], to: tuple[str, int], data: bytes) -> bytes:
    """An IPv4 packet that says it comes from `source`: RFC 791, RFC 768, without UDP checksum."""
    datagram = struct.pack("!4H", source[1], to[1], 8 + len(data), 0) + data
    header = struct.pack(
        "!BBHHHBBH4s4s",
        *(0x45, 0, 20 + len(datagram), 0, 0, 64, socket.IPPROTO_UDP, 0),
        *(socket.inet_aton(source[0]), socket.inet_aton(to[0])),
    )
    return header + datagram


def send_forged(source: tuple[str, int], to: tuple[str, int], data: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        raw.sendto(forged(source, to, data), (to[0], 0))
