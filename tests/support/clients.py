"""Clients for tests: plain sockets with a deadline on every step."""

from __future__ import annotations

import array
import contextlib
import fcntl
import functools
import random
import resource
import select
import selectors
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import kecho
from kecho.server._engine import CLOSE_REASONS

DEADLINE_S = 30.0


def connect(server: kecho.Server | int | str, **options: int) -> socket.socket:
    """Connects to a Server, a port of 127.0.0.1, or the path of a Unix socket.

    options: receive_buffer, send_buffer: SO_RCVBUF and SO_SNDBUF, bytes, set before connecting.
    """
    address = server.addresses[0] if isinstance(server, kecho.Server) else server
    if isinstance(address, int):
        address = ("127.0.0.1", address)
    if isinstance(address, str):
        family = socket.AF_UNIX
    else:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    client = socket.socket(family, socket.SOCK_STREAM)
    client.settimeout(DEADLINE_S)
    if "receive_buffer" in options:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options["receive_buffer"])
    if "send_buffer" in options:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, options["send_buffer"])
    try:
        client.connect(address)
    except BaseException:
        client.close()
        raise
    return client


def connected_to(one: socket.socket) -> socket.socket:
    """A client of a listening socket, of whatever family."""
    client = socket.socket(one.family)
    client.settimeout(DEADLINE_S)
    client.connect(one.getsockname())
    return client


def receive_exactly(client: socket.socket, size: int) -> bytes:
    """Reads `size` bytes, fewer only if the stream ends before."""
    chunks = []
    while size > 0:
        chunk = client.recv(min(size, 1 << 20))
        if not chunk:
            break
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def receive_until_end(client: socket.socket) -> bytes:
    chunks = []
    while chunk := client.recv(1 << 20):
        chunks.append(chunk)
    return b"".join(chunks)


def echo(client: socket.socket, message: bytes) -> bytes:
    """Sends a message that fits the socket buffers and returns as many bytes as it has."""
    client.sendall(message)
    return receive_exactly(client, len(message))


def free_port() -> int:
    """A port that no socket has at any IPv4 address, be it of a connection that has ended."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def reset(client: socket.socket) -> None:
    """Closes with RST: SO_LINGER 0, socket(7)."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def random_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def transfer(client: socket.socket, data: bytes) -> bytes:
    """Sends all of `data` and half-closes, while reading what comes back until its end."""

    def send() -> None:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        return receive_until_end(client)
    finally:
        sender.join(DEADLINE_S)


def wait_for(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Polls until `condition` is true; fails, naming `what`, after the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        time.sleep(0.005)


@contextlib.contextmanager
def connected(
    server: kecho.Server | int | str, count: int, **options: int
) -> Iterator[list[socket.socket]]:
    """`count` clients of connect(), closed in the end."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(server, **options)) for _ in range(count)]


@contextlib.contextmanager
def many_descriptors(count: int) -> Iterator[None]:
    """Skips where so many cannot be had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count:
        pytest.skip(f"RLIMIT_NOFILE is {hard} here, {count} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def answered(clients: Sequence[socket.socket], within_s: float = 0.0) -> list[socket.socket]:
    """Those among `clients` that have something to read."""
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client, selectors.EVENT_READ)
        return [key.fileobj for key, _ in selector.select(within_s)]  # type: ignore[misc]


def undelivered(client: socket.socket) -> int:
    """Bytes sent that the peer's kernel has not acknowledged: SIOCOUTQ, tcp(7)."""
    size = array.array("i", [0])
    fcntl.ioctl(client, termios.TIOCOUTQ, size)
    return size[0]


def wait_until_delivered(*clients: socket.socket) -> None:
    for client in clients:
        wait_for(lambda client=client: not undelivered(client), "the peer's kernel has the data")


def send_around_urgent(client: socket.socket) -> bytes:
    """A byte of urgent data between others: tcp(7). Returns what is to come back."""
    client.sendall(b"before")
    client.send(b"!", socket.MSG_OOB)
    client.sendall(b"after")
    return b"before!after"


def send_until_blocked(client: socket.socket, data: bytes, quiet_s: float = 0.4) -> int:
    """Sends without reading until there is no room for `quiet_s` seconds; returns how much went.

    Fails if `data` is all taken: it should be more than socket buffers hold.
    """
    view, sent = memoryview(data), 0
    client.setblocking(False)
    try:
        while select.select([], [client], [], quiet_s)[1]:
            assert sent < len(data), f"all of {sent} bytes were taken from a client that reads none"
            with contextlib.suppress(BlockingIOError):
                sent += client.send(view[sent : sent + (1 << 20)])
    finally:
        client.settimeout(DEADLINE_S)
    return sent


def receive_until_reset(client: socket.socket) -> bytes:
    """Reads until the peer's reset; fails if the stream ends like a finished one."""
    chunks = []
    while True:
        try:
            chunk = client.recv(1 << 20)
        except ConnectionResetError:
            return b"".join(chunks)
        assert chunk, f"end of file after {sum(map(len, chunks))} bytes, not a reset"
        chunks.append(chunk)


def transfer_all(
    clients: Sequence[socket.socket],
    payloads: Sequence[bytes],
    on_turn: Callable[[], object] = lambda: None,
) -> list[bytes]:
    """transfer() of payloads[i] through clients[i], all of them at once on one thread.

    on_turn: called each time that all of them have had their turn.
    """
    received = [bytearray() for _ in clients]
    sent = [0] * len(clients)
    deadline = time.monotonic() + 2 * DEADLINE_S
    with selectors.DefaultSelector() as selector:
        for index, client in enumerate(clients):
            client.setblocking(False)
            selector.register(client, selectors.EVENT_READ | selectors.EVENT_WRITE, index)
        while selector.get_map():
            assert time.monotonic() < deadline, "the streams have not ended"
            for key, ready in selector.select(1):
                index, client = key.data, clients[key.data]
                if ready & selectors.EVENT_WRITE:
                    with contextlib.suppress(BlockingIOError):
                        view = memoryview(payloads[index])[sent[index] :]
                        sent[index] += client.send(view[: 1 << 18]) if view else 0
                    if sent[index] == len(payloads[index]):
                        client.shutdown(socket.SHUT_WR)
                        selector.modify(client, selectors.EVENT_READ, index)
                if ready & selectors.EVENT_READ:
                    with contextlib.suppress(BlockingIOError):
                        chunk = client.recv(1 << 18)
                        received[index] += chunk
                        if not chunk:
                            selector.unregister(client)
            on_turn()
    for client in clients:
        client.settimeout(DEADLINE_S)
    return [bytes(one) for one in received]


@functools.cache
def plenty() -> bytes:
    """More than the kernel may hold of one connection, both ways: tcp(7); not random throughout."""
    limits = [Path(f"/proc/sys/net/ipv4/tcp_{which}").read_text() for which in ("rmem", "wmem")]
    held_most = 2 * sum(int(limit.split()[2]) for limit in limits)
    block = random_bytes((1 << 20) + 13)
    return block * (held_most // len(block) + 16)


def closed(**counts: int) -> kecho.NamedCounts:
    """What stats().closed should be: these, and 0 of every other reason."""
    names = CLOSE_REASONS
    assert counts.keys() <= set(names)
    return kecho.NamedCounts({name: counts.get(name, 0) for name in names})
