"""UDP echo servers with exactly one fault each, for the benchmark client to find."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Address = tuple[str, int]
# What to send, and to whom, when the datagram with this number (from 0) has come from there.
Answer = Callable[[int, bytes, Address], list[tuple[bytes, Address]]]


@contextmanager
def peer(answer: Answer) -> Iterator[int]:
    """A server on a free port of 127.0.0.1, which it gives. The probe's datagrams are echoed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        one.bind(("127.0.0.1", 0))
        one.settimeout(0.05)
        ending = threading.Event()

        def serve() -> None:
            number = 0
            prober: Address | None = None
            while not ending.is_set():
                try:
                    data, source = one.recvfrom(65536)
                except TimeoutError:
                    continue
                except ConnectionRefusedError:
                    continue
                prober = prober or source
                if source == prober:
                    one.sendto(data, source)
                    continue
                for reply, to in answer(number, data, source):
                    one.sendto(reply, to)
                number += 1

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield one.getsockname()[1]
        finally:
            ending.set()
            thread.join(30)


def honest(number: int, data: bytes, source: Address) -> list[tuple[bytes, Address]]:
    return [(data, source)]


def loses(every: int) -> Answer:
    """One of so many is not answered."""
    return lambda number, data, source: [] if number % every == 1 else [(data, source)]


def loses_all(number: int, data: bytes, source: Address) -> list[tuple[bytes, Address]]:
    return []


def answers_twice(number: int, data: bytes, source: Address) -> list[tuple[bytes, Address]]:
    return [(data, source), (data, source)]


def corrupts(every: int, position: int = 40) -> Answer:
    """One of so many has a flipped bit."""

    def answer(number: int, data: bytes, source: Address) -> list[tuple[bytes, Address]]:
        if number % every == 1:
            data = data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]
        return [(data, source)]

    return answer


def cuts(every: int, by: int) -> Answer:
    """One of so many is shorter by so many bytes, or longer."""

    def answer(number: int, data: bytes, source: Address) -> list[tuple[bytes, Address]]:
        if number % every == 1:
            data = data[:-by] if by > 0 else data + bytes(-by)
        return [(data, source)]

    return answer


def swaps() -> Answer:
    """Two of one client are answered in turn, the later one first."""
    held: dict[Address, bytes] = {}

    def answer(number: int, data: bytes, source: Address) -> list[tuple[bytes, Address]]:
        if source in held:
            return [(data, source), (held.pop(source), source)]
        held[source] = data
        return []

    return answer


def crosses(every: int) -> Answer:
    """One of so many goes to the client of the one before, too."""
    last: list[Address] = []

    def answer(number: int, data: bytes, source: Address) -> list[tuple[bytes, Address]]:
        replies = [(data, source)]
        if number % every == 1 and last and last[0] != source:
            replies.append((data, last[0]))
        last[:] = [source]
        return replies

    return answer


def is_late_with_the_second() -> Answer:
    """The second reply to each client comes with that to the next message."""
    seen: dict[Address, list[bytes]] = {}

    def answer(number: int, data: bytes, source: Address) -> list[tuple[bytes, Address]]:
        before = seen.setdefault(source, [])
        before.append(data)
        if len(before) == 2:
            return []
        if len(before) == 3:
            return [(before[1], source), (data, source)]
        return [(data, source)]

    return answer
