"""What makes loops of datagrams: an echo that is not kecho, and a link that takes its time."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import kecho
from kecho import UdpCounters
from support.clients import wait_for
from support.udp_clients import send_segments

UDP_GRO = 104  # <linux/udp.h>
SO_MEMINFO = 55  # <asm-generic/socket.h>
BUFFER_BYTES = 1 << 26  # a loop must end by the server's rule, not for want of room here

Address = tuple[str, int]


def datagrams_of(count: int, size: int) -> list[bytes]:
    """So many different ones, as far as there are so many of this size."""
    return [
        number.to_bytes(8, "little")[:size].ljust(size, b"\xa5") for number in range(1, count + 1)
    ]


def _dropped(one: socket.socket) -> int:
    """What found no room in its receive queue: socket(7)."""
    return int(struct.unpack("9I", one.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 36))[8])


def wait_for_the_end(
    servers: Sequence[kecho.Server], begun: int, others: Sequence[socket.socket] = ()
) -> int:
    """Until each of the datagrams that a loop was begun with has been refused by one of the
    servers, or dropped before one of them or of the other sockets. How many were answered."""
    counters: list[UdpCounters] = []

    def is_dead() -> bool:
        counters[:] = [udp for one in servers if (udp := one.stats().udp) is not None]
        ended = sum(udp.refused.total + udp.errors.total + udp.dropped for udp in counters)
        return ended + sum(map(_dropped, others)) >= begun

    wait_for(is_dead, "the loop has ended", 60)
    return sum(udp.sent for udp in counters)


def _bound(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    one = socket.socket(family, socket.SOCK_DGRAM)
    try:
        for option in ("SO_RCVBUF", "SO_SNDBUF"):
            forced = {"SO_RCVBUF": 33, "SO_SNDBUF": 32}[option]  # <asm-generic/socket.h>
            try:
                one.setsockopt(socket.SOL_SOCKET, forced, BUFFER_BYTES)
            except PermissionError:
                one.setsockopt(socket.SOL_SOCKET, getattr(socket, option), BUFFER_BYTES)
        one.bind(address)
    except BaseException:
        one.close()
        raise
    return one


@contextlib.contextmanager
def _running(work: Callable[[threading.Event], None]) -> Iterator[None]:
    ending = threading.Event()
    thread = threading.Thread(target=work, args=(ending,))
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join(30)


@contextlib.contextmanager
def plain_echo(host: str = "127.0.0.1", *, joined: bool = False) -> Iterator[socket.socket]:
    """An echo server that answers everything, as socat's: its socket, to begin a loop from.

    joined: it takes what the kernel joins, and sends it so (UDP_GRO, UDP_SEGMENT).
    """
    with _bound((host, 0)) as one:
        one.settimeout(0.05)
        if joined:
            one.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)

        def serve(ending: threading.Event) -> None:
            while not ending.is_set():
                with contextlib.suppress(TimeoutError, ConnectionRefusedError):
                    data, control, _, source = one.recvmsg(65536, 64)
                    for _, kind, size in control:
                        if kind == UDP_GRO and len(data) > (segment := struct.unpack("i", size)[0]):
                            send_segments(one, data, segment, source)
                            break
                    else:
                        one.sendto(data, source)

        with _running(serve):
            yield one


@contextlib.contextmanager
def relay(first: Address, second: Address, delay_s: float) -> Iterator[list[socket.socket]]:
    """A link between two servers, each of which sees the other at an address of the relay's.

    Gives the sockets that face them: what one sends comes to its server as if from the other.
    """
    with _bound((first[0], 0)) as one, _bound((second[0], 0)) as other:
        one.connect(first)
        other.connect(second)
        waiting: deque[tuple[float, socket.socket, bytes]] = deque()
        for each in (one, other):
            each.setblocking(False)

        def serve(ending: threading.Event) -> None:
            selector = selectors.DefaultSelector()
            selector.register(one, selectors.EVENT_READ, other)
            selector.register(other, selectors.EVENT_READ, one)
            with selector:
                while not ending.is_set():
                    left = waiting[0][0] - time.monotonic() if waiting else 0.05
                    for key, _ in selector.select(max(left, 0)):
                        with contextlib.suppress(BlockingIOError, ConnectionRefusedError):
                            for _ in range(64):
                                data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                                waiting.append((time.monotonic() + delay_s, key.data, data))
                    now = time.monotonic()
                    while waiting and waiting[0][0] <= now:
                        _, to, data = waiting.popleft()
                        with contextlib.suppress(ConnectionRefusedError):
                            to.send(data)

        with _running(serve):
            yield [one, other]
