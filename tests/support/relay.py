"""A relay between two network namespaces that keeps every packet for a while: a long way, where the
kernel has no netem."""

from __future__ import annotations

import fcntl
import os
import selectors
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from support.namespaces import Namespace

MTU = 65520
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000  # <linux/if_tun.h>
NAME = "far"


def _open_end(namespace: Namespace, address: str) -> int:
    with namespace:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", NAME.encode(), IFF_TUN | IFF_NO_PI))
    namespace.run("ip", "link", "set", NAME, "mtu", str(MTU), "txqueuelen", "10000", "up")
    namespace.run("ip", "address", "add", f"{address}/24", "dev", NAME)
    return fd


@contextmanager
def far_apart(ends: dict[str, Namespace], delay_s: float) -> Iterator[None]:
    """Two namespaces by their addresses in one /24; a packet takes `delay_s` each way. OSError: no
    TUN device can be made here."""
    with ExitStack() as stack:
        fds = []
        for address, namespace in ends.items():
            fds.append(_open_end(namespace, address))
            stack.callback(os.close, fds[-1])
        over = threading.Event()
        relay = threading.Thread(target=_relay, args=(*fds, delay_s, over))
        relay.start()
        try:
            yield
        finally:
            over.set()
            relay.join()


def _relay(first: int, second: int, delay_s: float, over: threading.Event) -> None:
    waiting: dict[int, deque[tuple[float, bytes]]] = {first: deque(), second: deque()}
    other = {first: second, second: first}
    with selectors.DefaultSelector() as selector:
        for fd in other:
            selector.register(fd, selectors.EVENT_READ)
        while not over.is_set():
            for key, _ in selector.select(0.001):
                for _ in range(64):
                    try:
                        packet = os.read(key.fd, 65536)
                    except BlockingIOError:
                        break
                    waiting[other[key.fd]].append((time.monotonic() + delay_s, packet))
            for fd, packets in waiting.items():
                while packets and packets[0][0] <= time.monotonic():
                    os.write(fd, packets.popleft()[1])
