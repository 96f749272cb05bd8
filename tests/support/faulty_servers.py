"""Echo servers with exactly one fault each, for the benchmark client to find.

A thread for each connection, so that one which waits holds up no other.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Self

Answer = Callable[[socket.socket, bytes], None]


class Peer:
    """A server on a free port of 127.0.0.1. `answer(connection, data)` answers what was read."""

    def __init__(
        self, answer: Answer, greeting: bytes = b"", chunk: int = 65536, ends_after_s: float = 0
    ) -> None:
        self._answer = answer
        self._greeting = greeting
        self._chunk = chunk
        self._ends_after_s = ends_after_s
        self._leaving = threading.Event()
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.accepted = 0
        self.accepted_at_s: list[float] = []
        self.most: int | None = None  # connections that are taken
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if self.accepted == self.most:
                connection.close()
                continue
            self.accepted += 1
            self.accepted_at_s.append(time.monotonic())
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._connections.add(connection)
            self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            if self._greeting:
                connection.sendall(self._greeting)
            while data := connection.recv(self._chunk):
                self._answer(connection, data)
            self._leaving.wait(self._ends_after_s)
        with self._lock:
            self._connections.discard(connection)
        connection.close()


def echoes_records(size: int) -> Peer:
    """Answers whole records of so many bytes, as they are read."""
    parts: dict[socket.socket, bytes] = {}

    def answer(connection: socket.socket, data: bytes) -> None:
        data = parts.pop(connection, b"") + data
        whole = len(data) - len(data) % size
        parts[connection] = data[whole:]
        connection.sendall(data[:whole])

    return Peer(answer)


def echoes_lines() -> Peer:
    """Answers whole lines, and ends the connection over one that is no text."""
    parts: dict[socket.socket, bytes] = {}

    def answer(connection: socket.socket, data: bytes) -> None:
        *lines, rest = (parts.pop(connection, b"") + data).split(b"\n")
        parts[connection] = rest
        for line in lines:
            if not line.decode("ascii").isprintable():
                raise EOFError
            connection.sendall(line + b"\n")

    return Peer(answer)


def ends_after(messages: int, size: int, *, by_reset: bool = False) -> Peer:
    """Ends a connection when it has echoed so many messages of so many bytes: cleanly, or with what
    came meanwhile unread, which is a reset."""
    echoed: dict[socket.socket, int] = {}

    def answer(connection: socket.socket, data: bytes) -> None:
        echoed[connection] = echoed.get(connection, 0) + len(data)
        connection.sendall(data)
        if echoed[connection] >= messages * size:
            if by_reset:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                time.sleep(0.02)  # the reply has been read, and the next message has come
            raise EOFError

    return Peer(answer, chunk=size)


def closes_at_once() -> Peer:
    """Reads a message, and ends the connection."""

    def answer(connection: socket.socket, data: bytes) -> None:
        raise EOFError

    return Peer(answer)


def serves_one() -> Peer:
    """Takes one connection, and no other."""
    peer = Peer(lambda connection, data: connection.sendall(data))
    peer.most = 1
    return peer


def delays(seconds: float) -> Peer:
    """Each reply comes exactly that much later."""

    def answer(connection: socket.socket, data: bytes) -> None:
        due = time.monotonic() + seconds
        while (left := due - time.monotonic()) > 0:
            time.sleep(left)
        connection.sendall(data)

    return Peer(answer)


def delays_the_second(seconds: float) -> Peer:
    """Echoes at once, but on its second connection, where each reply waits."""
    seen: list[socket.socket] = []

    def answer(connection: socket.socket, data: bytes) -> None:
        if connection not in seen and len(seen) < 2:
            seen.append(connection)
        if connection in seen[1:]:
            time.sleep(seconds)
        connection.sendall(data)

    return Peer(answer)


def stalls(after_s: float, for_s: float) -> Peer:
    """Once, so long after the first byte, nothing is answered on any connection for so long."""
    first: list[float] = []

    def answer(connection: socket.socket, data: bytes) -> None:
        first.append(time.monotonic()) if not first else None
        since = time.monotonic() - first[0]
        if after_s <= since < after_s + for_s:
            time.sleep(after_s + for_s - since)
        connection.sendall(data)

    return Peer(answer)


def corrupts(every: int) -> Peer:
    """Of so many bytes, over all connections, one comes back with a flipped bit."""
    lock = threading.Lock()
    passed = [0]

    def answer(connection: socket.socket, data: bytes) -> None:
        with lock:
            begin = passed[0]
            passed[0] += len(data)
        wrong = every - begin % every - 1
        if wrong < len(data):
            data = data[:wrong] + bytes([data[wrong] ^ 4]) + data[wrong + 1 :]
        connection.sendall(data)

    return Peer(answer)


class _PerConnection:
    """Counts the bytes of each connection."""

    def __init__(self) -> None:
        self._seen: dict[socket.socket, int] = {}

    def begin_of(self, connection: socket.socket, data: bytes) -> int:
        begin = self._seen.get(connection, 0)
        self._seen[connection] = begin + len(data)
        return begin


def drops_a_byte(at: int) -> Peer:
    """The byte at this position of each connection does not come back."""
    positions = _PerConnection()

    def answer(connection: socket.socket, data: bytes) -> None:
        index = at - positions.begin_of(connection, data)
        connection.sendall(data[:index] + data[index + 1 :] if 0 <= index < len(data) else data)

    return Peer(answer)


def repeats_a_byte(at: int) -> Peer:
    """The byte at this position of each connection comes back twice."""
    positions = _PerConnection()

    def answer(connection: socket.socket, data: bytes) -> None:
        index = at - positions.begin_of(connection, data)
        connection.sendall(data[: index + 1] + data[index:] if 0 <= index < len(data) else data)

    return Peer(answer)


def swaps(size: int, at: int) -> Peer:
    """From position `at` on, two messages that were read together are answered in turn."""
    positions = _PerConnection()

    def answer(connection: socket.socket, data: bytes) -> None:
        if positions.begin_of(connection, data) >= at and len(data) == 2 * size:
            data = data[size:] + data[:size]
        connection.sendall(data)

    return Peer(answer)


def crosses(at: int) -> Peer:
    """From position `at` on, two connections get each other's replies."""
    positions = _PerConnection()
    lock = threading.Lock()
    waiting: list[tuple[socket.socket, bytes]] = []

    def answer(connection: socket.socket, data: bytes) -> None:
        if positions.begin_of(connection, data) < at:
            connection.sendall(data)
            return
        with lock:
            if not waiting:
                waiting.append((connection, data))
                return
            other, others_data = waiting.pop()
        connection.sendall(others_data)
        other.sendall(data)

    return Peer(answer)


def answers_twice(after: int) -> Peer:
    """From position `after` on, everything is echoed twice."""
    positions = _PerConnection()

    def answer(connection: socket.socket, data: bytes) -> None:
        connection.sendall(data * 2 if positions.begin_of(connection, data) >= after else data)

    return Peer(answer)


def hurries(after: int) -> Peer:
    """From position `after` on, an urgent byte comes before each echo: tcp(7)."""
    positions = _PerConnection()

    def answer(connection: socket.socket, data: bytes) -> None:
        if positions.begin_of(connection, data) >= after:
            connection.send(b"!", socket.MSG_OOB)
        connection.sendall(data)

    return Peer(answer)


def greets(greeting: bytes) -> Peer:
    """Says something at once, and echoes nothing."""
    return Peer(lambda connection, data: None, greeting)


def silent_after(size: int) -> Peer:
    """Echoes so many bytes of a connection, then nothing."""
    positions = _PerConnection()

    def answer(connection: socket.socket, data: bytes) -> None:
        if positions.begin_of(connection, data) < size:
            connection.sendall(data)

    return Peer(answer)


def closes_after(size: int, *, by_reset: bool = False) -> Peer:
    """Ends a connection when so many bytes have come, in the middle of the reply."""
    positions = _PerConnection()

    def answer(connection: socket.socket, data: bytes) -> None:
        if positions.begin_of(connection, data) < size:
            connection.sendall(data)
            return
        connection.sendall(data[: len(data) // 2])
        if by_reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise EOFError

    return Peer(answer)


def dead_but_for_the_first() -> Peer:
    """Echoes on its first connection; the others are open, and nothing comes of them."""
    first: list[socket.socket] = []

    def answer(connection: socket.socket, data: bytes) -> None:
        if not first:
            first.append(connection)
        if connection is first[0]:
            connection.sendall(data)

    return Peer(answer)


def dribbles(every_s: float, after: int) -> Peer:
    """From position `after` on, echoes a byte at a time."""
    positions = _PerConnection()

    def answer(connection: socket.socket, data: bytes) -> None:
        if positions.begin_of(connection, data) < after:
            connection.sendall(data)
            return
        for index in range(len(data)):
            connection.sendall(data[index : index + 1])
            time.sleep(every_s)

    return Peer(answer)


def adds_later(data: bytes, after_s: float) -> Peer:
    """Echoes, and some time later says more; but not on the first connection, the probe's."""
    first: list[socket.socket] = []

    def answer(connection: socket.socket, received: bytes) -> None:
        first.append(connection) if not first else None
        connection.sendall(received)
        if connection is not first[0]:
            time.sleep(after_s)
            connection.sendall(data)

    return Peer(answer)


def ends_late(seconds: float) -> Peer:
    """Closes so long after its client has."""
    return Peer(lambda connection, data: connection.sendall(data), ends_after_s=seconds)
