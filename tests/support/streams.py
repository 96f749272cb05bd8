"""Clients that compare every byte that comes back, whatever happens to them."""

from __future__ import annotations

import contextlib
import errno
import random
import selectors
import socket
import time
from collections import Counter
from collections.abc import Callable

from support.clients import DEADLINE_S, connect, random_bytes

SOURCE = random_bytes((1 << 20) + 7, seed=7)
PIECE_MOST = 1 << 17
CUT = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)


class Stream:
    """A connection whose stream is SOURCE over and over, from an offset of its own."""

    def __init__(self, client: socket.socket, size: int, offset: int) -> None:
        """size: bytes to send before the half-close."""
        self.socket = client
        self.socket.setblocking(False)
        self.size = size
        self.offset = offset
        self.sent = 0
        self.received = 0
        self.end = ""  # how it ended: "whole", "reset", or "early": an end of file too soon

    @staticmethod
    def _piece(position: int, size: int) -> memoryview:
        start = position % len(SOURCE)
        return memoryview(SOURCE)[start : start + size]

    def send(self, most: int = PIECE_MOST) -> None:
        """What fits now, `most` bytes at most; the half-close after the last."""
        if self.sent == self.size:
            return
        try:
            most = min(most, self.size - self.sent)
            self.sent += self.socket.send(self._piece(self.offset + self.sent, most))
            if self.sent == self.size:
                self.socket.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.end = "early"  # a reset in CLOSE_WAIT: an end of file came before
        except (ConnectionResetError, ConnectionAbortedError):
            self.end = "reset"
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise

    def receive(self) -> None:
        """Compares what is there; fails on the first wrong byte."""
        try:
            chunk = memoryview(self.socket.recv(PIECE_MOST))
        except BlockingIOError:
            return
        except CUT:
            self.end = "reset"
            return
        if not chunk:
            self.end = "whole" if self.received == self.sent == self.size else "early"
        while chunk:
            expected = self._piece(self.offset + self.received, len(chunk))
            assert chunk[: len(expected)] == expected, f"wrong bytes after {self.received}"
            self.received += len(expected)
            assert self.received <= self.sent, "more came back than was sent"
            chunk = chunk[len(expected) :]


def exchange(
    server: int | str,
    count: int,
    *,
    seed: int = 0,
    size_most: int = 300_000,
    deadline_s: float = DEADLINE_S,
    meanwhile: Callable[[], object] = lambda: None,
) -> Counter[str]:
    """`count` streams at once, of random sizes and pace; how many ended in which way.

    Fails on a wrong byte, and when some have not ended after the deadline. On TCP fails on an end
    of file where a reset was due, too. A connect that is refused is an end: "refused".
    """
    chance = random.Random(seed)
    ends: Counter[str] = Counter()
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for _ in range(count):
            # Some have so little room that the server has to wait for them.
            options = {"receive_buffer": 16_384} if chance.random() < 0.3 else {}
            try:
                client = stack.enter_context(connect(server, **options))
            except ConnectionRefusedError:
                ends["refused"] += 1
                continue
            except CUT:
                ends["reset"] += 1
                continue
            size = chance.choice([1, 100, 5_000, size_most])
            stream = Stream(client, chance.randint(1, size), chance.randrange(len(SOURCE)))
            both = selectors.EVENT_READ | selectors.EVENT_WRITE
            selector.register(client, both, stream)
        end_s = time.monotonic() + deadline_s
        while selector.get_map():
            left = [key.data for key in selector.get_map().values()]
            assert time.monotonic() < end_s, f"{len(left)} streams have not ended: " + repr(
                [vars(one) for one in left[:3]]
            )
            for key, ready in selector.select(0.1):
                stream = key.data
                if ready & selectors.EVENT_WRITE:
                    stream.send(chance.choice([1, 1_000, PIECE_MOST]))
                    if stream.sent == stream.size:
                        selector.modify(stream.socket, selectors.EVENT_READ, stream)
                if ready & selectors.EVENT_READ and not stream.end:
                    stream.receive()
                if stream.end:
                    ends[stream.end] += 1
                    selector.unregister(stream.socket)
            meanwhile()
    if isinstance(server, int):
        assert not ends["early"], f"an end of file where a reset was due: {ends}"
    return ends
